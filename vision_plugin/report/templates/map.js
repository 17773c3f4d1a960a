"use strict";

// The map: features by their directions, in any column's colours; the address keeps the view.
(() => {
  const { byId, element, isolated, thumb } = VP;
  const { report } = Columns;
  const picked = new Set();
  let colour = report.sort, marked = -1;
  const hrefOf = (row) => `features/${report.ids[row]}.html`;

  const nameOf = (row) => (report.names && report.names[row]) || Columns.commonest(row)?.text || "";
  const images = (row, n) => report.images[row].slice(0, n).map((slot) => thumb(report, slot));

  const show = (row) => {
    marked = plot.marked = row;
    plot.draw();
    byId("card").replaceChildren(...(row < 0 ? [] : [
      element("a", { href: hrefOf(row) }, `Feature ${report.ids[row]}`), element("div", { class: "quiet clip" }, isolated(nameOf(row))),
      element("div", {}, `${Columns.columnOf(colour).title}: ${Columns.text(colour, row)}`), element("div", { class: "thumbs" }, ...images(row, 4))]));
  };

  const plot = new Plot(byId("plot"), {
    hover: (row) => { if (row >= 0) show(row); },
    open: (row, event) => { if (row >= 0 && row === marked && event.detail !== 0 && event.pointerType === "mouse") location.href = hrefOf(row); else { show(row); remember(); } },
    pick: (rows) => { for (const row of rows) picked.add(row); drawPicked(); },
    view: () => remember(),
  });
  plot.drag = "pan";
  plot.points = { x: MAP.points.map(([x]) => x), y: MAP.points.map(([, y]) => 1 - y) };
  plot.zooms();

  const drawPicked = () => {
    const ids = [...picked].map((row) => report.ids[row]);
    byId("n-picked").textContent = picked.size ? VP.count(picked.size, "feature") : "None";
    byId("latents").value = VP.listOf(ids);
    byId("chosen").replaceChildren(...[...picked].slice(0, 60).map((row) => element("li", { class: "card" },
      element("div", { class: "head" }, element("a", { href: hrefOf(row) }, String(report.ids[row])), element("span", { class: "value" }, Columns.text(colour, row))),
      element("span", { class: "text quiet" }, isolated(nameOf(row))), element("div", { class: "tiles-four" }, ...images(row, 4)))));
    plot.chosen = picked.size ? (row) => picked.has(row) : null;
    plot.draw();
    remember();
  };

  const drawColour = () => {
    const colours = Columns.colours(colour);
    plot.colour = colours.of;
    const ramp = element("span", { class: "ramp", role: "presentation" });
    if (colours.scale) {
      ramp.style.background = `linear-gradient(to right, ${Array.from({ length: 9 }, (_, i) => Columns.ramp(i / 8)).join(",")})`;
      byId("legend").replaceChildren(VP.format(colours.scale.low, colours.kind), ramp, VP.format(colours.scale.high, colours.kind) + (colours.scale.log ? " (log)" : ""));
    } else byId("legend").replaceChildren(...colours.kinds.map(([name, paint]) => { const swatch = element("span", { class: "swatch" }); swatch.style.background = paint; return element("span", {}, swatch, ` ${name}`); }));
    byId("colour").value = colour;
    plot.draw();
  };

  const remember = () => {
    const { x, y, zoom } = plot.view, pairs = [];
    if (colour !== report.sort) pairs.push(["colour", colour]);
    if (marked >= 0) pairs.push(["feature", report.ids[marked]]);
    if (zoom !== 1 || x !== 0.5 || y !== 0.5) pairs.push(["view", [x, y, zoom].map((v) => v.toPrecision(5)).join(",")]);
    if (picked.size && picked.size <= 1000) pairs.push(["pick", VP.listOf([...picked].map((row) => report.ids[row]))]);
    VP.writeHash(pairs);
  };

  const recall = () => {
    const said = VP.readHash();
    colour = Columns.columnOf(said.get("colour")) ? said.get("colour") : report.sort;
    const view = (said.get("view") ?? "").split(",").map(Number);
    plot.view = view.length === 3 && view.every(Number.isFinite) ? { x: view[0], y: view[1], zoom: Math.min(Math.max(view[2], 0.7), 200) } : { x: 0.5, y: 0.5, zoom: 1 };
    picked.clear();
    for (const id of (said.get("pick") ?? "").split(" ").filter(Boolean).map(Number)) if (Columns.rowOf.has(id)) picked.add(Columns.rowOf.get(id));
    const row = said.has("feature") ? Columns.rowOf.get(Number(said.get("feature"))) ?? -1 : -1;
    if (row >= 0 && !said.has("view")) plot.view = { x: plot.points.x[row], y: plot.points.y[row], zoom: 3 };
    drawColour();
    show(row);
    drawPicked();
  };

  // The next feature by place, from left to right: the keyboard reaches every one.
  const along = Array.from(report.ids.keys()).sort((a, b) => plot.points.x[a] - plot.points.x[b] || a - b);
  const step = (by) => {
    const at = along.indexOf(marked), row = along[(at + by + along.length) % along.length];
    const [x, y] = plot.to(row), { w, h } = plot.box();
    if (x < 0 || y < 0 || x > w || y > h) plot.view = { ...plot.view, x: plot.points.x[row], y: plot.points.y[row] };
    show(row);
    remember();
  };

  byId("plot").addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key], key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (move) { plot.view = { ...plot.view, x: plot.view.x + (0.1 * move[0]) / plot.view.zoom, y: plot.view.y + (0.1 * move[1]) / plot.view.zoom }; plot.changed(); }
    else if (event.key === "+" || event.key === "=") plot.zoom(1.4);
    else if (event.key === "-") plot.zoom(1 / 1.4);
    else if (key === "n") step(1);
    else if (key === "p") step(-1);
    else if (key === "x" && marked >= 0) { if (picked.has(marked)) picked.delete(marked); else picked.add(marked); drawPicked(); }
    else if (event.key === "Enter" && marked >= 0) location.href = hrefOf(marked);
    else return;
    event.preventDefault();
  });

  Columns.options(byId("colour"), colour);
  byId("colour").addEventListener("change", () => { colour = byId("colour").value; drawColour(); show(marked); remember(); });
  byId("find").addEventListener("change", () => {
    const row = Columns.rowOf.get(Number(byId("find").value.replace("#", "")));
    if (row === undefined) return;
    plot.view = { x: plot.points.x[row], y: plot.points.y[row], zoom: Math.max(3, plot.view.zoom) };
    show(row);
    plot.changed();
  });
  for (const radio of document.getElementsByName("drag")) radio.addEventListener("change", () => { plot.drag = radio.value; byId("plot").style.cursor = radio.value === "pan" ? "grab" : "crosshair"; });
  byId("in").addEventListener("click", () => plot.zoom(1.5));
  byId("out").addEventListener("click", () => plot.zoom(1 / 1.5));
  byId("whole").addEventListener("click", () => { plot.view = { x: 0.5, y: 0.5, zoom: 1 }; plot.changed(); });
  byId("unpick").addEventListener("click", () => { picked.clear(); drawPicked(); });
  byId("copy").addEventListener("click", () => VP.copy(byId("latents"), byId("copied")));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", recall);
  recall();
  document.documentElement.dataset.ready = "";
})();
