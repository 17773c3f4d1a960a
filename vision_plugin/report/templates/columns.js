"use strict";

// The rows of data.js as columns of numbers: filters, order, search, colours.
const Columns = (() => {
  const report = REPORT;
  const n = report.ids.length;
  const columns = report.columns;
  const values = report.values.map((list) => Float64Array.from(list, (v) => (v === null ? NaN : v)));
  const states = Int8Array.from(report.states);
  const place = new Map(columns.map((column, index) => [column.key, index]));
  const rowOf = new Map(report.ids.map((id, row) => [id, row]));
  const names = report.names;
  const FITS = [0, 1e-4, 1e-2, 1];
  const fold = (text) => text.toLocaleLowerCase();
  let folded = null;
  const STATES = ["usual", "few", "dense", "dead"];
  // Scores of features on too few images, or on almost all, come after all others.
  const APART = [0, 2, 1, 3];
  let nameRanks = null;

  const rankNames = () => {
    const collator = new Intl.Collator(undefined, { numeric: true });
    const ranks = new Map([...new Set(names)].sort(collator.compare).map((name, rank) => [name, rank]));
    // Features without a name come last in either direction.
    return Float64Array.from(names, (name) => (name ? ranks.get(name) : NaN));
  };
  // Many names take a moment: they are ranked before somebody asks, when the page has nothing to do.
  if (names) (window.requestIdleCallback ?? setTimeout)(() => { nameRanks ??= rankNames(); });

  const valuesOf = (key) => {
    if (key === "id") return Float64Array.from(report.ids);
    if (key === "name") return (nameRanks ??= rankNames());
    return values[place.get(key)];
  };

  const columnOf = (key) => columns[place.get(key)];

  const text = (key, row) => {
    const column = columnOf(key), value = values[place.get(key)][row];
    return column.kind === "category" ? column.names[value] ?? "–" : VP.format(value, column.kind);
  };

  // How well a text has the words: as whole words 3, at the start of a word 2, anywhere 1.
  const escaped = (words) => words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const fitOf = (words) => {
    const start = new RegExp(`(?<![\\p{L}\\p{N}])${escaped(words)}`, "u"), whole = new RegExp(`${start.source}(?:s|es)?(?![\\p{L}\\p{N}])`, "u");
    return (text) => (!text.includes(words) ? 0 : whole.test(text) ? 3 : start.test(text) ? 2 : 1);
  };

  // How well each picture's texts and file name have the words, by slot.
  const picturesWith = (words) => {
    folded ??= { names: (names ?? []).map(fold), texts: report.pictures.texts.all.map(fold), files: report.pictures.files.map(fold) };
    const fit = fitOf(words), texts = folded.texts.map(fit);
    return Uint8Array.from(report.pictures.texts.of, (list, slot) => {
      let best = folded.files.length ? fit(folded.files[slot]) : 0;
      for (const one of list) if (texts[one] > best) best = texts[one];
      return best;
    });
  };

  // Of every feature, how well its number, name and top images have the words; null for no words.
  // rank orders features: number, name, images by how many and how near the top; hits counts them.
  const matches = (words) => {
    if (!words) return null;
    const pictures = picturesWith(words), fit = fitOf(words), rank = new Float64Array(n), hits = new Int32Array(n);
    for (let row = 0; row < n; row++) {
      const counts = [0, 0, 0, 0];
      let near = 0;
      report.images[row].forEach((slot, place) => { const how = pictures[slot]; counts[how]++; if (how) near += FITS[how] / (place + 1); });
      const named = folded.names.length ? fit(folded.names[row]) : 0;
      hits[row] = counts[3] || counts[2] || counts[1];
      rank[row] = counts[3] + counts[2] * FITS[2] + counts[1] * FITS[1] + near / 1e5 + 100 * (named && FITS[named]) + (String(report.ids[row]).startsWith(words) ? 1000 : 0);
    }
    return { rank, hits };
  };

  // Rows that fit, in order. filters: key -> [low, high], or a list of categories.
  const select = ({ query, state, filters, sort, down }) => {
    const words = query.trim().toLocaleLowerCase();
    const exact = words.startsWith("#") ? words.slice(1).split(/[\s,#]+/).filter(Boolean) : null;
    const matched = exact ? null : matches(words);
    const wanted = state === "all" ? -1 : STATES.indexOf(state);
    const ranges = [...filters].map(([key, range]) => [values[place.get(key)], columnOf(key).kind === "category", range]);
    const kept = new Int32Array(n);
    let size = 0;
    rows: for (let row = 0; row < n; row++) {
      if (wanted >= 0 && states[row] !== wanted) continue;
      if (exact && exact.length && !exact.includes(String(report.ids[row]))) continue;
      if (matched && matched.rank[row] === 0) continue;
      for (const [list, isCategory, range] of ranges) {
        const value = list[row];
        if (isCategory ? !range.includes(value) : !(value >= range[0] && value <= range[1])) continue rows;
      }
      kept[size++] = row;
    }
    const found = kept.subarray(0, size);
    return { order: ordered(found, sort === "match" && !matched ? report.sort : sort, down, matched), matched };
  };

  const ordered = (rows, sort, down, matched) => {
    const key = sort === "match" ? matched.rank : valuesOf(sort);
    const column = columnOf(sort), ranks = sort === "match" || Boolean(column && column.ranks);
    const group = new Int8Array(n);
    for (const row of rows) group[row] = Number.isNaN(key[row]) ? 4 : ranks ? APART[states[row]] : 0;
    const then = sort === "match" ? valuesOf(report.sort) : null;
    const sign = sort === "match" || down ? -1 : 1;
    return rows.sort((a, b) => {
      if (group[a] !== group[b]) return group[a] - group[b];
      const x = key[a], y = key[b];
      if (x !== y && x === x) return sign * (x - y);
      if (then && then[a] !== then[b]) return (Number.isNaN(then[b]) ? -Infinity : then[b]) - (Number.isNaN(then[a]) ? -Infinity : then[a]);
      return a - b;
    });
  };

  // What a feature's top images are called most often, with how many of them.
  const commonest = (row) => {
    const counts = new Map();
    const { all, of } = report.pictures.texts;
    for (const slot of report.images[row]) for (const one of of[slot]) counts.set(one, (counts.get(one) || 0) + 1);
    let best = -1, most = 0;
    for (const [one, times] of counts) if (times > most || (times === most && rarity(one) < rarity(best))) [best, most] = [one, times];
    return best < 0 ? null : { text: all[best], times: most, of: report.images[row].length };
  };

  let seen = null;
  const rarity = (one) => {
    if (!seen) {
      seen = new Int32Array(report.pictures.texts.all.length);
      for (const list of report.pictures.texts.of) for (const each of list) seen[each]++;
    }
    return seen[one] ?? Infinity;
  };

  // ---------------------------------------------------------------- scales and colours

  const extent = (key) => {
    let low = Infinity, high = -Infinity;
    for (const value of valuesOf(key)) if (value === value) { if (value < low) low = value; if (value > high) high = value; }
    return low > high ? [0, 1] : [low, high];
  };

  // Shares spread over powers of ten, other numbers evenly. Returns a function to 0..1 and back.
  const scaleOf = (key) => {
    const column = columnOf(key), list = valuesOf(key);
    let [low, high] = extent(key);
    if (column && column.kind === "share") {
      let least = 1;
      for (const value of list) if (value > 0 && value < least) least = value;
      const bottom = Math.log10(least), span = Math.max(1e-9, Math.log10(Math.max(high, least)) - bottom);
      return { low: least, high, to: (v) => (v > 0 ? (Math.log10(v) - bottom) / span : v === 0 ? 0 : NaN), from: (t) => 10 ** (bottom + t * span), log: true };
    }
    if (high === low) { low -= 0.5; high += 0.5; }
    return { low, high, to: (v) => (v - low) / (high - low), from: (t) => low + t * (high - low), log: false };
  };

  const RAMP = { light: [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [221, 190, 20]], dark: [[120, 90, 190], [90, 130, 210], [60, 170, 165], [110, 210, 110], [253, 231, 37]] };
  const KINDS = { light: ["#1f5fd0", "#c2410c", "#0f766e", "#7e22ce", "#a16207"], dark: ["#86b0ff", "#fb923c", "#5eead4", "#d8b4fe", "#facc15"] };

  const ramp = (t) => {
    const stops = RAMP[VP.dark() ? "dark" : "light"], at = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
    const i = Math.min(Math.floor(at), stops.length - 2), f = at - i;
    return `rgb(${stops[i].map((v, c) => Math.round(v + f * (stops[i + 1][c] - v))).join(",")})`;
  };

  // A colour for every row.
  const colours = (key) => {
    const column = columnOf(key), list = valuesOf(key), none = VP.dark() ? "#5a5f69" : "#c6cad1";
    if (column && column.kind === "category") {
      const kinds = KINDS[VP.dark() ? "dark" : "light"];
      return { of: (row) => (Number.isNaN(list[row]) ? none : kinds[list[row] % kinds.length]), kinds: column.names.map((name, i) => [name, kinds[i % kinds.length]]) };
    }
    const scale = scaleOf(key), steps = Array.from({ length: 65 }, (_, i) => ramp(i / 64));
    return { of: (row) => { const t = scale.to(list[row]); return Number.isNaN(t) ? none : steps[Math.round(Math.min(Math.max(t, 0), 1) * 64)]; }, scale, kind: column ? column.kind : "number" };
  };

  const options = (field, chosen, extra = []) => {
    field.replaceChildren(...extra.map(([key, title]) => VP.element("option", { value: key }, title)), ...columns.map((column) => VP.element("option", { value: column.key }, column.title)));
    field.value = chosen;
  };

  return { report, n, columns, states, STATES, names, rowOf, valuesOf, columnOf, text, select, picturesWith, commonest, extent, scaleOf, ramp, colours, options };
})();
