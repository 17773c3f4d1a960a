"use strict";

// A histogram per column. A drag over one selects its range; fields do the same by keyboard.
const Histograms = (() => {
  const BINS = 36, WIDTH = 216, HEIGHT = 56;
  const drawn = new Map();
  let change = () => {};

  const start = (root, changed) => {
    change = changed;
    for (const column of Columns.columns) {
      const figure = VP.element("figure", { class: "histogram" }, VP.element("figcaption", { title: column.note }, VP.isolated(column.title)));
      drawn.set(column.key, column.kind === "category" ? categories(figure, column) : numbers(figure, column));
      root.append(figure);
    }
  };

  const categories = (figure, column) => {
    const boxes = column.names.map((name, number) => {
      const box = VP.element("input", { type: "checkbox" });
      box.addEventListener("change", () => {
        const kept = boxes.flatMap((each, i) => (each.box.checked ? [i] : []));
        change(column.key, kept.length === 0 || kept.length === boxes.length ? null : kept);
      });
      const told = VP.element("span", { class: "quiet" });
      figure.append(VP.element("label", { class: "category" }, box, VP.isolated(name), told));
      return { box, told, number };
    });
    return (rows, range) => {
      const list = Columns.valuesOf(column.key), counts = new Int32Array(boxes.length);
      for (const row of rows) if (list[row] >= 0) counts[list[row]]++;
      for (const { box, told, number } of boxes) {
        box.checked = !range || range.includes(number);
        told.textContent = counts[number].toLocaleString("en");
      }
    };
  };

  const numbers = (figure, column) => {
    const scale = Columns.scaleOf(column.key), list = Columns.valuesOf(column.key);
    const bin = new Int16Array(list.length).fill(-1), all = new Int32Array(BINS);
    for (let row = 0; row < list.length; row++) {
      const t = scale.to(list[row]);
      if (Number.isNaN(t)) continue;
      bin[row] = Math.min(BINS - 1, Math.max(0, Math.floor(t * BINS)));
      all[bin[row]]++;
    }
    const top = Math.max(1, ...all), step = WIDTH / BINS;
    const svg = VP.shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const bar = (count, i) => `M${(i * step + 0.5).toFixed(1)} ${HEIGHT}v-${count ? Math.max(1.5, (count / top) * HEIGHT).toFixed(1) : 0}h${(step - 1).toFixed(1)}V${HEIGHT}z`;
    const within = VP.shape("path", { class: "in" });
    const brush = VP.shape("rect", { class: "brush", y: 0, height: HEIGHT, width: 0 });
    svg.append(VP.shape("path", { class: "all", d: [...all].map(bar).join("") }), within, brush);
    const field = (name, end) => {
      const made = VP.element("input", { inputmode: "decimal", autocomplete: "off", placeholder: VP.format(end, column.kind), "aria-label": `${column.title}: ${name}` });
      made.addEventListener("change", () => change(column.key, read()));
      return made;
    };
    const low = field("at least", scale.low), high = field("at most", scale.high);
    const number = (text, otherwise) => {
      const value = Number(text.trim().replace(/%$/, ""));
      return text.trim() === "" || Number.isNaN(value) ? otherwise : text.trim().endsWith("%") ? value / 100 : value;
    };
    const read = () => {
      const range = [number(low.value, -Infinity), number(high.value, Infinity)];
      return range[0] === -Infinity && range[1] === Infinity ? null : range;
    };
    figure.append(svg, VP.element("div", { class: "limits" }, low, high));
    let from = null;
    const share = (event) => { const box = svg.getBoundingClientRect(); return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)); };
    svg.addEventListener("pointerdown", (event) => { from = share(event); svg.setPointerCapture(event.pointerId); });
    svg.addEventListener("pointermove", (event) => { if (from !== null) show(from, share(event)); });
    svg.addEventListener("pointercancel", () => { from = null; });
    svg.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const [a, b] = [from, share(event)].sort((x, y) => x - y);
      from = null;
      // At the ends, what lies beyond the scale belongs to it: a share of 0 has no logarithm.
      change(column.key, b - a < 0.01 ? null : [a === 0 ? -Infinity : rounded(scale.from(a)), b === 1 ? Infinity : rounded(scale.from(b))]);
    });
    const rounded = (value) => Number(value.toPrecision(4));
    const show = (a, b) => { brush.setAttribute("x", Math.min(a, b) * WIDTH); brush.setAttribute("width", Math.abs(b - a) * WIDTH); };
    return (rows, range) => {
      const counts = new Int32Array(BINS);
      for (const row of rows) if (bin[row] >= 0) counts[bin[row]]++;
      within.setAttribute("d", [...counts].map(bar).join(""));
      low.value = range && range[0] > -Infinity ? String(range[0]) : "";
      high.value = range && range[1] < Infinity ? String(range[1]) : "";
      const ends = range ? [range[0] === -Infinity ? 0 : scale.to(range[0]) || 0, range[1] === Infinity ? 1 : scale.to(range[1])] : [0, 0];
      show(Math.min(1, Math.max(0, ends[0])), Math.min(1, Math.max(0, ends[1])));
    };
  };

  const draw = (rows, filters) => { for (const [key, one] of drawn) one(rows, filters.get(key)); };

  return { start, draw };
})();
