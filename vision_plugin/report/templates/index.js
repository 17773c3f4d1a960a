"use strict";

// The index: a grid or a list of all features, with filters that the address keeps.
(() => {
  const { byId, element, isolated, thumb } = VP;
  const { report, columns, names, STATES } = Columns;
  const initial = { query: "", state: "all", sort: report.sort, down: true, mode: "grid", across: columns[0].key, up: "frequency", colour: columns.at(-1).key, open: "" };
  let view = { ...initial }, filters = new Map(), picked = new Set(), order = new Int32Array(0), matched = null, before = null;
  const shownValue = () => (view.sort === "id" || view.sort === "name" ? report.sort : view.sort);
  const hrefOf = (id) => `features/${id}.html`;

  // ---------------------------------------------------------------- cards and rows

  const textOf = (row) => {
    if (names && names[row]) return names[row];
    const common = Columns.commonest(row);
    return common ? (common.times > 1 ? `${common.text} (${common.times} of ${common.of})` : common.text) : "";
  };

  const valueText = (row) => {
    if (view.sort === "match" && matched) {
      return matched.hits[row] === 0 ? "by name" : `${matched.hits[row]} of ${report.images[row].length}`;
    }
    return Columns.text(view.sort === "match" ? report.sort : shownValue(), row);
  };

  const checkbox = (id) => {
    const box = element("input", { type: "checkbox", "aria-label": `Select feature ${id}` });
    box.checked = picked.has(id);
    box.addEventListener("change", () => pick(id, box.checked));
    return box;
  };

  const badge = (row) => {
    const state = STATES[Columns.states[row]];
    return state === "usual" ? [] : [element("span", { class: `badge ${state}` }, state === "few" ? "few" : state)];
  };

  const card = (row) => {
    const id = report.ids[row], text = textOf(row), images = report.images[row].slice(0, 4);
    const four = element("div", { class: "tiles-four", "aria-hidden": "true" }, ...images.map((slot) => thumb(report, slot)));
    four.addEventListener("click", () => { location.href = hrefOf(id); });
    return element("div", { class: picked.has(id) ? "card picked" : "card", role: "listitem" },
      element("div", { class: "head" }, checkbox(id), element("a", { href: hrefOf(id) }, String(id)), ...badge(row), element("span", { class: "value" }, valueText(row))),
      element("span", { class: "text quiet", title: text }, isolated(text)), four);
  };

  const line = (row, place) => {
    const id = report.ids[row], text = textOf(row);
    const cell = (name, ...children) => element("div", { class: `cell ${name}`, role: "cell" }, ...children);
    const made = element("div", { class: "row", role: "presentation" },
      cell("id", checkbox(id), element("a", { href: hrefOf(id) }, String(id)), ...badge(row)),
      cell("text", isolated(text)),
      ...shownColumns().map((key) => cell("value", key === "match" ? valueText(row) : Columns.text(key, row))),
      cell("thumbs", ...report.images[row].slice(0, thumbsInLine()).map((slot) => thumb(report, slot))));
    return element("div", { class: picked.has(id) ? "picked" : "", role: "row", "aria-rowindex": place + 2 }, made);
  };

  const width = () => byId("view").clientWidth;
  const thumbsInLine = () => (width() > 1100 ? 8 : width() > 800 ? 6 : width() > 520 ? 4 : 2);
  const shownColumns = () => {
    const first = view.sort === "match" && matched ? "match" : shownValue() === "match" ? report.sort : shownValue();
    const room = Math.max(1, Math.floor((width() - 330 - thumbsInLine() * 55) / 98));
    return [first, ...columns.map((column) => column.key).filter((key) => key !== first)].slice(0, room);
  };

  const layout = () => {
    const w = width();
    if (view.mode === "list") return { width: w, height: 68, across: 1, gap: 4 };
    const gap = 10, across = Math.max(2, Math.floor((w + gap) / 178)), card = Math.floor((w + gap) / across) - gap;
    return { width: card, height: card + 40 + gap, across, gap };
  };

  const list = new VirtualList(byId("view"), { layout, make: (row, place) => (view.mode === "list" ? line(row, place) : card(row)) });

  const drawHeads = () => {
    const root = byId("view");
    byId("heads")?.remove();
    root.setAttribute("role", view.mode === "list" ? "table" : "list");
    root.setAttribute("aria-label", "Features");
    if (view.mode !== "list") { root.removeAttribute("aria-rowcount"); return; }
    root.setAttribute("aria-rowcount", order.length + 1);
    document.documentElement.style.setProperty("--thumbs", thumbsInLine());
    const head = (key, title, name, note) => {
      const button = element("button", { type: "button", "data-sort": key, title: note || undefined }, isolated(title));
      const made = element("div", { class: `cell ${name}`, role: "columnheader" }, button);
      if (view.sort === key) {
        made.setAttribute("aria-sort", view.down ? "descending" : "ascending");
        button.append(view.down ? " ▼" : " ▲");
      }
      button.addEventListener("click", () => sortBy(key));
      return made;
    };
    const heads = element("div", { class: "heads", id: "heads", role: "row", "aria-rowindex": 1 }, head("id", "Feature", "id"),
      names ? head("name", "Name", "text") : element("div", { class: "cell text", role: "columnheader" }, "Commonest label"),
      ...shownColumns().map((key) => (key === "match" ? element("div", { class: "cell value", role: "columnheader" }, "Match") : head(key, Columns.columnOf(key).title, "value", Columns.columnOf(key).note))),
      element("div", { class: "cell thumbs", role: "columnheader" }, "Top images"));
    root.before(element("div", { id: "heads-place" }));
    byId("heads-place").replaceWith(heads);
    // Heads stand before the rows, which are placed by number; the table owns both.
    root.setAttribute("aria-owns", "heads");
  };

  // ---------------------------------------------------------------- drawing

  const plot = new Plot(byId("plot"), {
    pick: (outline) => {
      const xs = outline.map(([x]) => x), ys = outline.map(([, y]) => y), canvas = byId("plot");
      const t = (v, size) => Math.min(1, Math.max(0, (v - 14) / (size - 28)));
      const across = Columns.scaleOf(view.across), up = Columns.scaleOf(view.up);
      const range = (scale, a, b) => [a <= 0 ? -Infinity : Number(scale.from(a).toPrecision(4)), b >= 1 ? Infinity : Number(scale.from(b).toPrecision(4))];
      filters.set(view.across, range(across, t(Math.min(...xs), canvas.clientWidth), t(Math.max(...xs), canvas.clientWidth)));
      filters.set(view.up, range(up, 1 - t(Math.max(...ys), canvas.clientHeight), 1 - t(Math.min(...ys), canvas.clientHeight)));
      update();
    },
    open: (row) => { if (row >= 0) location.href = hrefOf(report.ids[row]); },
    hover: (row) => {
      plot.marked = row;
      plot.draw();
      byId("plot-note").textContent = row < 0 ? axes() : `Feature ${report.ids[row]}: ${textOf(row)} · ${Columns.text(view.across, row)} across, ${Columns.text(view.up, row)} up`;
    },
  });
  plot.stretch = true;

  const axes = () => {
    const told = (key) => { const column = Columns.columnOf(key), scale = Columns.scaleOf(key); return column.kind === "category" ? column.title : `${column.title} ${VP.format(scale.low, column.kind)} to ${VP.format(scale.high, column.kind)}${scale.log ? " (log)" : ""}`; };
    return `Across: ${told(view.across)}. Up: ${told(view.up)}.`;
  };

  const drawPlot = () => {
    if (!byId("scatter").open) return;
    const place = (key) => { const scale = Columns.scaleOf(key); return Float64Array.from(Columns.valuesOf(key), (v) => Math.min(1, Math.max(0, scale.to(v)))); };
    plot.points = { x: place(view.across), y: place(view.up) };
    plot.colour = Columns.colours(view.colour).of;
    const inside = new Uint8Array(report.ids.length);
    for (const row of order) inside[row] = 1;
    plot.chosen = order.length === report.ids.length ? null : (row) => inside[row] === 1;
    byId("plot-note").textContent = axes();
    plot.draw();
  };

  const drawFilters = () => {
    const chips = [...filters].map(([key, range]) => {
      const column = Columns.columnOf(key);
      const text = column.kind === "category" ? range.map((i) => column.names[i]).join(", ")
        : range[0] === -Infinity ? `at most ${VP.format(range[1], column.kind)}` : range[1] === Infinity ? `at least ${VP.format(range[0], column.kind)}` : `${VP.format(range[0], column.kind)} to ${VP.format(range[1], column.kind)}`;
      const button = element("button", { type: "button", "aria-label": `Remove the filter ${column.title} ${text}` }, isolated(column.title), ` ${text} ×`);
      button.addEventListener("click", () => { filters.delete(key); update(); });
      return button;
    });
    byId("filters").replaceChildren(...chips);
  };

  // Pictures that have the words and can be opened patch by patch: from a thing to what fires at it.
  const drawFound = () => {
    const words = view.query.trim().toLocaleLowerCase(), fit = words && !words.startsWith("#") ? Columns.picturesWith(words) : null;
    const slots = fit ? report.pictures.pages.filter((slot) => fit[slot] > 0).sort((a, b) => fit[b] - fit[a]) : [];
    byId("found").hidden = slots.length === 0;
    byId("found-title").textContent = `Patch by patch: ${VP.count(slots.length, "picture")}`;
    byId("found-pictures").replaceChildren(...slots.slice(0, 12).map((slot) => {
      const number = report.pictures.numbers[slot], label = report.pictures.labels[slot];
      return element("a", { href: `images.html#image=${number}`, "aria-label": `Image ${number}${label ? `: ${label}` : ""}`, title: label || undefined }, thumb(report, slot));
    }));
  };

  const drawPicked = () => {
    byId("picked").hidden = picked.size === 0;
    byId("n-picked").textContent = `${picked.size.toLocaleString("en")} selected`;
    byId("latents").value = VP.listOf(picked);
  };

  const drawControls = () => {
    byId("query").value = view.query;
    byId("sort").value = view.sort;
    byId("turn").textContent = view.down ? "▼" : "▲";
    for (const name of ["state", "mode"]) for (const radio of document.getElementsByName(name)) radio.checked = radio.value === view[name];
    for (const [id, name] of [["across", "across"], ["up-column", "up"], ["colour", "colour"]]) byId(id).value = view[name];
    byId("distributions").open = view.open.includes("d");
    byId("scatter").open = view.open.includes("s");
  };

  const update = ({ same = false } = {}) => {
    ({ order, matched } = Columns.select({ ...view, filters }));
    drawControls();
    drawHeads();
    list.setOrder(order);
    byId("empty").hidden = order.length > 0;
    const all = report.ids.length;
    byId("count").textContent = order.length === all ? VP.count(all, "feature") : `${order.length.toLocaleString("en")} of ${VP.count(all, "feature")}`;
    byId("random").disabled = order.length === 0;
    drawFilters();
    drawFound();
    drawPicked();
    if (byId("distributions").open) Histograms.draw(order, filters);
    drawPlot();
    if (!same) remember();
  };

  // ---------------------------------------------------------------- state, kept in the address

  const remember = () => {
    const pairs = Object.entries(view).filter(([name, value]) => value !== initial[name]).map(([name, value]) => [name, String(value)]);
    const end = (value) => (Number.isFinite(value) ? String(value) : "");
    for (const [key, range] of filters) pairs.push([`f.${key}`, Columns.columnOf(key).kind === "category" ? range.join(",") : `${end(range[0])}:${end(range[1])}`]);
    if (picked.size && picked.size <= 1000) pairs.push(["pick", VP.listOf(picked)]);
    VP.writeHash(pairs);
    VP.stored("vision_plugin.index:" + new URL(".", location.href).pathname, location.hash);
  };

  const recall = () => {
    view = { ...initial };
    filters = new Map();
    picked = new Set();
    for (const [name, text] of VP.readHash()) {
      if (name === "pick") picked = new Set(text.split(" ").filter(Boolean).map(Number).filter((id) => Columns.rowOf.has(id)));
      else if (name.startsWith("f.") && Columns.columnOf(name.slice(2))) {
        const column = Columns.columnOf(name.slice(2));
        if (column.kind === "category") filters.set(column.key, text.split(",").map(Number).filter((i) => i in column.names));
        else { const [low, high] = text.split(":"); filters.set(column.key, [low ? Number(low) : -Infinity, high ? Number(high) : Infinity]); }
      } else if (Object.hasOwn(initial, name)) view[name] = typeof initial[name] === "boolean" ? text === "true" : text;
    }
    if (view.state !== "all" && !STATES.includes(view.state)) view.state = "all";
    if (!["grid", "list"].includes(view.mode)) view.mode = "grid";
    for (const name of ["sort", "across", "up", "colour"]) {
      const known = Columns.columnOf(view[name]) || (name === "sort" && ["id", "match", ...(names ? ["name"] : [])].includes(view[name]));
      if (!known) view[name] = initial[name];
    }
    for (const [key, range] of filters) if (range.some(Number.isNaN)) filters.delete(key);
  };

  const change = (changes) => { Object.assign(view, changes); update(); };
  const sortBy = (key) => change({ sort: key, down: view.sort === key ? !view.down : key !== "id" && key !== "name" });

  const pick = (id, is) => {
    if (is) picked.add(id); else picked.delete(id);
    drawPicked();
    for (const item of byId("view").children) if (item.querySelector("input")?.getAttribute("aria-label") === `Select feature ${id}`) {
      item.classList.toggle("picked", is);
      item.querySelector("input").checked = is;
    }
    remember();
  };

  const search = () => {
    const query = byId("query").value, was = view.query.trim(), is = query.trim() && !query.trim().startsWith("#");
    // A search lists what matches best first, and its end brings back the order before.
    if (is && (!was || was.startsWith("#"))) { before = view.sort === "match" ? report.sort : view.sort; view.sort = "match"; }
    if (!is && view.sort === "match") view.sort = before ?? report.sort;
    change({ query });
  };

  const clear = () => { const { sort, down, mode, open } = view; view = { ...initial, sort: sort === "match" ? before ?? report.sort : sort, down, mode, open }; filters = new Map(); update(); };
  const openRandom = () => { if (order.length) location.href = hrefOf(report.ids[order[Math.floor(Math.random() * order.length)]]); };

  // ---------------------------------------------------------------- wiring

  const counts = [0, 0, 0, 0];
  for (const state of Columns.states) counts[state]++;
  STATES.forEach((state, i) => { document.querySelector(`[name=state][value=${state}] + span small`).textContent = counts[i].toLocaleString("en"); });
  Columns.options(byId("sort"), report.sort, [["match", "Best match"], ["id", "Number"], ...(names ? [["name", "Name"]] : [])]);
  for (const id of ["across", "up-column", "colour"]) Columns.options(byId(id), report.sort);
  Histograms.start(byId("histograms"), (key, range) => { if (range) filters.set(key, range); else filters.delete(key); update(); });
  byId("query").addEventListener("input", search);
  byId("sort").addEventListener("change", () => change({ sort: byId("sort").value, down: !["id", "name"].includes(byId("sort").value) }));
  byId("turn").addEventListener("click", () => change({ down: !view.down }));
  for (const name of ["state", "mode"]) for (const radio of document.getElementsByName(name)) radio.addEventListener("change", () => change({ [name]: radio.value }));
  for (const [id, name] of [["across", "across"], ["up-column", "up"], ["colour", "colour"]]) byId(id).addEventListener("change", () => change({ [name]: byId(id).value }));
  for (const [id, letter] of [["distributions", "d"], ["scatter", "s"]]) {
    byId(id).addEventListener("toggle", () => {
      const open = [...new Set([...view.open].filter((each) => each !== letter).concat(byId(id).open ? [letter] : []))].sort().join("");
      if (open === view.open) return;
      view.open = open;
      if (byId("distributions").open) Histograms.draw(order, filters);
      drawPlot();
      remember();
      list.draw();
    });
  }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("reset", (event) => { event.preventDefault(); clear(); });
  byId("clear-empty").addEventListener("click", clear);
  byId("random").addEventListener("click", openRandom);
  byId("pick-all").addEventListener("click", () => { for (const row of order) picked.add(report.ids[row]); update(); });
  byId("unpick").addEventListener("click", () => { picked.clear(); update(); });
  byId("copy").addEventListener("click", () => VP.copy(byId("latents"), byId("copied")));

  const placeOf = (target) => { const item = target.closest?.(".item"); return item ? Number(item.dataset.place) : -1; };
  document.addEventListener("keydown", (event) => {
    if (event.target === byId("query") && event.key === "Escape") { event.preventDefault(); byId("query").blur(); return; }
    if (event.target === byId("query") && event.key === "ArrowDown") { event.preventDefault(); list.focus(0); return; }
    if (VP.typing(event) || event.target.matches("[type=radio]")) return;
    const at = placeOf(event.target), step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: list.across, ArrowUp: -list.across }[event.key];
    const key = event.key.toLowerCase();
    if (event.key === "/") { event.preventDefault(); byId("query").focus(); }
    else if (step && (at >= 0 || event.key === "ArrowDown")) { if (at < 0 && document.activeElement !== document.body && document.activeElement !== byId("main")) return; event.preventDefault(); list.focus(at < 0 ? 0 : at + step); }
    else if (key === "x" && at >= 0) { const id = report.ids[order[at]]; pick(id, !picked.has(id)); }
    else if (key === "g") change({ mode: view.mode === "grid" ? "list" : "grid" });
    else if (key === "r") openRandom();
  });
  addEventListener("hashchange", () => { recall(); update({ same: true }); });
  let known = 0;
  new ResizeObserver(() => { if (width() !== known) { known = width(); drawHeads(); list.redraw(); drawPlot(); } }).observe(byId("view"));
  recall();
  update({ same: true });
  document.documentElement.dataset.ready = "";
})();
