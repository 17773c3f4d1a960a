"use strict";

// Two dictionaries: features that both have, features that one has alone, distributions.
(() => {
  const { byId, element, isolated, thumb, shape } = VP;
  const { report } = Columns;
  const MEASURES = { correlation: "correlation over images", cosine: "cosine of decoder directions" };
  let view = { other: 0, measure: "", least: 0.7, part: "both" }, pairs = [];

  const other = () => COMPARE[view.other];
  const measures = () => Object.keys(MEASURES).filter((name) => other()[name]);

  // Rows of each part: [row here or -1, latent there or -1, closeness].
  const match = () => {
    const found = other()[view.measure], parts = { both: [], here: [], there: [] };
    if (!found) return parts;
    found.forth.forEach(([latent, value], row) => {
      if (Columns.states[row] === 3) return;
      (value >= view.least ? parts.both : parts.here).push([row, latent, value]);
    });
    found.back.forEach(([id, value], latent) => {
      if (other().states[latent] !== 3 && !(value >= view.least)) parts.there.push([Columns.rowOf.get(id) ?? -1, latent, value]);
    });
    for (const list of Object.values(parts)) list.sort((a, b) => b[2] - a[2]);
    parts.here.reverse();
    parts.there.reverse();
    return parts;
  };

  const n = () => Math.max(1, Math.min(4, Math.floor((byId("view").clientWidth / 2 - 140) / 50)));
  const nameOf = (row) => (report.names && report.names[row]) || Columns.commonest(row)?.text || "";

  const make = ([row, latent, value]) => {
    const here = element("div", { class: "side" });
    if (row >= 0) here.append(element("a", { href: `features/${report.ids[row]}.html` }, String(report.ids[row])), ...report.images[row].slice(0, n()).map((slot) => thumb(report, slot)), element("span", { class: "quiet clip" }, isolated(nameOf(row))));
    const there = element("div", { class: "side" }, element("b", {}, String(latent)), ...other().images[latent].slice(0, n()).map((slot) => thumb(report, slot)));
    return element("div", { role: "listitem" }, element("div", { class: "pair" }, here, element("div", { class: "between" }, VP.format(value, "number")), there));
  };

  const narrow = () => byId("view").clientWidth < 640;
  const list = new VirtualList(byId("view"), { layout: () => ({ width: byId("view").clientWidth, height: narrow() ? 92 : 62, across: 1, gap: 4 }), make });

  // ---------------------------------------------------------------- distributions on one axis

  const chart = (title, here, there, kind) => {
    const both = [...here, ...there].filter((v) => Number.isFinite(v) && (kind !== "share" || v > 0));
    const to = kind === "share" ? Math.log10 : (v) => v;
    const low = to(Math.min(...both.length ? [both.reduce((a, b) => Math.min(a, b))] : [0])), high = to(both.length ? both.reduce((a, b) => Math.max(a, b)) : 1), BINS = 40, W = 360, H = 96;
    const span = high - low || 1;
    const shares = [here, there].map((values) => {
      const counts = new Float64Array(BINS);
      let total = 0;
      for (const v of values) if (Number.isFinite(v) && (kind !== "share" || v > 0)) { counts[Math.min(BINS - 1, Math.max(0, Math.floor(((to(v) - low) / span) * BINS)))]++; total++; }
      return counts.map((c) => c / Math.max(1, total));
    });
    const top = Math.max(1e-9, ...shares[0], ...shares[1]);
    const line = (counts, colour) => {
      const points = [];
      counts.forEach((share, i) => { const y = (H - (share / top) * H).toFixed(1); points.push(`${((i * W) / BINS).toFixed(1)},${y}`, `${(((i + 1) * W) / BINS).toFixed(1)},${y}`); });
      return shape("polyline", { class: `line colour${colour}`, points: points.join(" ") });
    };
    const from = (t) => (kind === "share" ? 10 ** (low + t * span) : low + t * span);
    const label = (t, anchor) => shape("text", { x: t * W, y: H + 14, "text-anchor": anchor }, VP.format(from(t), kind));
    const svg = shape("svg", { viewBox: `-2 -4 ${W + 4} ${H + 22}`, role: "img", "aria-label": `${title}: distribution here and of ${other().name}` },
      shape("line", { class: "axis", x1: 0, x2: W, y1: H, y2: H }), line(shares[0], 0), line(shares[1], 1), label(0, "start"), label(0.5, "middle"), label(1, "end"));
    const key = (colour, name) => element("span", { class: "key" }, shape("svg", { class: "swatch", viewBox: "0 0 14 4", "aria-hidden": "true" }, shape("rect", { class: `colour${colour}`, width: 14, height: 4 })), " ", isolated(name));
    return element("figure", { class: "chart" }, element("figcaption", {}, title), svg, element("p", { class: "small" }, key(0, "here"), key(1, other().name)));
  };

  const drawCharts = () => {
    const numbers = (values) => values.map((v) => (v === null ? NaN : v)), { columns } = other();
    const made = [chart("Images on which a feature fires", Columns.valuesOf("frequency"), numbers(columns.frequency), "share"),
      chart("Largest activation", Columns.valuesOf("max"), numbers(columns.max), "number")];
    for (const name of measures()) made.push(chart(`Best ${MEASURES[name]}`, other()[name].forth.map(([, v]) => v), other()[name].back.map(([, v]) => v), "number"));
    byId("charts").replaceChildren(...made);
  };

  const update = ({ same = false } = {}) => {
    if (!measures().includes(view.measure)) view.measure = measures()[0] ?? "";
    byId("other").value = String(view.other);
    byId("measure").replaceChildren(...measures().map((name) => element("option", { value: name }, MEASURES[name])));
    byId("measure").value = view.measure;
    byId("least").value = String(view.least);
    const parts = match();
    for (const radio of document.getElementsByName("part")) {
      radio.checked = radio.value === view.part;
      radio.nextElementSibling.querySelector("small").textContent = parts[radio.value].length.toLocaleString("en");
    }
    pairs = parts[view.part];
    byId("about").replaceChildren("This SAE beside ", isolated(other().name), `: ${VP.count(report.ids.length, "feature")} here, ${VP.count(other().n, "feature")} there. Correlations are over ${VP.count(other().n_images, "image")}.`);
    byId("count").textContent = view.part === "both" ? `${VP.count(pairs.length, "pair")}, closest first` : `${VP.count(pairs.length, "feature")}, most alone first, beside the nearest of the other`;
    byId("empty").hidden = pairs.length > 0;
    list.setOrder(pairs);
    if (!same) VP.writeHash(Object.entries(view).filter(([name, value]) => value !== { other: 0, measure: measures()[0], least: 0.7, part: "both" }[name]).map(([name, value]) => [name, String(value)]));
  };

  const recall = () => {
    const said = VP.readHash();
    view = { other: Math.min(COMPARE.length - 1, Math.max(0, Number(said.get("other")) || 0)), measure: said.get("measure") ?? "", least: Number.isFinite(Number(said.get("least") ?? 0.7)) ? Number(said.get("least") ?? 0.7) : 0.7, part: ["both", "here", "there"].includes(said.get("part")) ? said.get("part") : "both" };
    update({ same: true });
    drawCharts();
  };

  byId("view").setAttribute("role", "list");
  byId("view").setAttribute("aria-label", "Features");
  byId("other").replaceChildren(...COMPARE.map((one, i) => element("option", { value: i }, one.name)));
  byId("other").addEventListener("change", () => { view.other = Number(byId("other").value); update(); drawCharts(); });
  byId("measure").addEventListener("change", () => { view.measure = byId("measure").value; update(); });
  byId("least").addEventListener("change", () => { view.least = Number(byId("least").value) || 0; update(); });
  for (const radio of document.getElementsByName("part")) radio.addEventListener("change", () => { view.part = radio.value; update(); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", recall);
  recall();
  document.documentElement.dataset.ready = "";
})();
