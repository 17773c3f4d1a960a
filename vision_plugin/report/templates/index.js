"use strict";

// REPORT comes from data.js. Everything that is text is set as text, never as markup.
(() => {
  const report = REPORT;
  const n = report.ids.length;
  const byId = (id) => document.getElementById(id);
  const columns = report.columns;
  const values = report.values.map((list) => Float64Array.from(list, (v) => (v === null ? NaN : v)));
  const searched = report.names ? report.names.map((name) => name.toLocaleLowerCase()) : null;
  const fired = values[columns.findIndex((column) => column.key === "frequency")];
  const initial = { sort: report.sort, down: true, query: "", state: "all", column: "", low: "", high: "", page: 1, size: 50 };
  let view = { ...initial };
  let order = new Int32Array(0);
  let nameRanks = null;

  // ---------------------------------------------------------------- numbers

  const format = (value, kind) => {
    if (Number.isNaN(value)) return "–";
    if (kind === "share") return (value * 100 >= 10 || value === 0 ? (value * 100).toFixed(value === 0 ? 0 : 1) : (value * 100).toPrecision(2)) + "%";
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
  };

  const keyOf = (name) => {
    if (name === "id") return Float64Array.from(report.ids);
    if (name === "name") return (nameRanks ??= rankNames());
    return values[columns.findIndex((column) => column.key === name)];
  };

  const rankNames = () => {
    const collator = new Intl.Collator(undefined, { numeric: true });
    const sorted = Array.from({ length: n }, (_, row) => row);
    sorted.sort((a, b) => collator.compare(report.names[a], report.names[b]) || a - b);
    const ranks = new Float64Array(n);
    // Features without a name come last in either direction.
    sorted.forEach((row, rank) => { ranks[row] = report.names[row] ? rank : NaN; });
    return ranks;
  };

  // ---------------------------------------------------------------- filter and sort

  const limit = (text, otherwise, kind) => {
    const trimmed = text.trim();
    const number = Number(trimmed.replace(/%$/, ""));
    if (trimmed === "" || Number.isNaN(number)) return otherwise;
    return trimmed.endsWith("%") && kind === "share" ? number / 100 : number;
  };

  const select = () => {
    const query = view.query.trim().toLocaleLowerCase();
    const exact = query.startsWith("#") ? query.slice(1) : null;
    const ranged = columns.findIndex((column) => column.key === view.column);
    const kind = ranged < 0 ? "" : columns[ranged].kind;
    const low = limit(view.low, -Infinity, kind), high = limit(view.high, Infinity, kind);
    const bounded = ranged >= 0 && (low > -Infinity || high < Infinity);
    const found = [];
    for (let row = 0; row < n; row++) {
      if (view.state !== "all" && (fired[row] > 0) !== (view.state === "alive")) continue;
      if (bounded && !(values[ranged][row] >= low && values[ranged][row] <= high)) continue;
      if (exact !== null) {
        if (exact && String(report.ids[row]) !== exact) continue;
      } else if (query && !(searched && searched[row].includes(query)) && !String(report.ids[row]).startsWith(query)) continue;
      found.push(row);
    }
    const key = keyOf(view.sort), sign = view.down ? -1 : 1;
    // What has no number comes last in either direction.
    found.sort((a, b) => {
      const x = key[a], y = key[b];
      if (x === y) return a - b;
      if (Number.isNaN(x)) return Number.isNaN(y) ? a - b : 1;
      if (Number.isNaN(y)) return -1;
      return sign * (x - y);
    });
    order = Int32Array.from(found);
  };

  // ---------------------------------------------------------------- drawing

  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  const isolated = (text) => element("bdi", {}, text);

  const drawHead = () => {
    const heads = [["id", "Feature", ""]];
    if (report.names) heads.push(["name", "Name", ""]);
    for (const column of columns) heads.push([column.key, column.title, column.note]);
    for (const [key, title, note] of heads) {
      const button = element("button", { type: "button", "data-sort": key }, isolated(title), element("span", { "aria-hidden": "true" }));
      if (note) button.title = note;
      button.addEventListener("click", () => change({ sort: key, down: view.sort === key ? !view.down : key !== "id" && key !== "name", page: 1 }));
      byId("head").append(element("th", { scope: "col", class: key === "id" || key === "name" ? "" : "number" }, button));
    }
    byId("head").append(element("th", { scope: "col" }, "Top images"));
    for (const column of columns) byId("range-column").append(element("option", { value: column.key }, column.title));
  };

  const drawRow = (row) => {
    const id = report.ids[row], href = `features/${id}.html`, name = report.names ? report.names[row] : "";
    const line = element("tr", {}, element("th", { scope: "row" }, element("a", { href }, String(id))));
    if (fired[row] === 0) line.firstChild.append(" ", element("span", { class: "badge dead" }, "dead"));
    if (report.names) line.append(element("td", { class: "name", title: name }, isolated(name)));
    columns.forEach((column, place) => line.append(element("td", { class: "number" }, format(values[place][row], column.kind))));
    const strip = element("a", { href, tabindex: "-1", "aria-label": `Feature ${id}: images` });
    for (const image of report.images[row]) {
      strip.append(element("img", { src: `images/${image}.${report.suffix}`, alt: "", width: 64, height: 64, loading: "lazy", decoding: "async" }));
    }
    line.append(element("td", { class: "strip" }, strip));
    return line;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(order.length / view.size));
    view.page = Math.min(Math.max(1, view.page), pages);
    const start = (view.page - 1) * view.size;
    const lines = Array.from(order.subarray(start, start + view.size), drawRow);
    byId("rows").replaceChildren(...lines);
    byId("empty").hidden = order.length > 0;
    byId("count").textContent = order.length === n
      ? `${n.toLocaleString("en")} features`
      : `${order.length.toLocaleString("en")} of ${n.toLocaleString("en")} features`;
    byId("page").value = view.page;
    byId("pages").textContent = `of ${pages.toLocaleString("en")}`;
    byId("first").disabled = byId("previous").disabled = view.page === 1;
    byId("next").disabled = byId("last").disabled = view.page === pages;
    byId("random").disabled = order.length === 0;
    for (const button of document.querySelectorAll("[data-sort]")) {
      const sorted = button.dataset.sort === view.sort;
      button.lastChild.textContent = sorted ? (view.down ? " ▼" : " ▲") : "";
      if (sorted) button.parentElement.setAttribute("aria-sort", view.down ? "descending" : "ascending");
      else button.parentElement.removeAttribute("aria-sort");
    }
  };

  // ---------------------------------------------------------------- state, kept in the address

  const remember = () => {
    const kept = Object.entries(view).filter(([name, value]) => value !== initial[name]);
    const hash = new URLSearchParams(kept.map(([name, value]) => [name, String(value)])).toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    try {
      sessionStorage.setItem("vision_plugin.index:" + new URL(".", location.href).pathname, location.hash);
    } catch { /* storage is forbidden here: the pages of features then link to the plain index */ }
  };

  const recall = () => {
    view = { ...initial };
    for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
      if (!Object.hasOwn(initial, name)) continue;
      if (typeof initial[name] === "number") view[name] = Math.max(1, parseInt(text, 10) || initial[name]);
      else if (typeof initial[name] === "boolean") view[name] = text === "true";
      else view[name] = text;
    }
    if (!["25", "50", "100", "200"].includes(String(view.size))) view.size = initial.size;
    if (!["all", "alive", "dead"].includes(view.state)) view.state = "all";
    if (!keyOf(view.sort)) view.sort = initial.sort;
    byId("query").value = view.query;
    byId("range-column").value = columns.some((column) => column.key === view.column) ? view.column : columns[0].key;
    byId("range-low").value = view.low;
    byId("range-high").value = view.high;
    byId("size").value = String(view.size);
    for (const radio of document.getElementsByName("state")) radio.checked = radio.value === view.state;
  };

  const change = (changes) => {
    const turned = Object.keys(changes).every((name) => name === "page");
    Object.assign(view, changes);
    if (!turned) select();
    draw();
    remember();
    if (turned) byId("table").scrollIntoView({ block: "start" });
  };

  const readControls = () => {
    const bounded = byId("range-low").value || byId("range-high").value;
    change({
      query: byId("query").value, low: byId("range-low").value, high: byId("range-high").value,
      column: bounded ? byId("range-column").value : "", page: 1,
      state: document.querySelector("[name=state]:checked").value,
    });
  };

  const clear = () => {
    history.replaceState(null, "", location.pathname + location.search);
    const { sort, down, size } = view;
    recall();
    change({ sort, down, size, page: 1 });
  };

  const openRandom = () => {
    if (order.length === 0) return;
    location.href = `features/${report.ids[order[Math.floor(Math.random() * order.length)]]}.html`;
  };

  // ---------------------------------------------------------------- wiring

  drawHead();
  const controls = byId("controls");
  controls.addEventListener("input", readControls);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("reset", (event) => { event.preventDefault(); clear(); });
  byId("clear-empty").addEventListener("click", clear);
  byId("random").addEventListener("click", openRandom);
  byId("first").addEventListener("click", () => change({ page: 1 }));
  byId("previous").addEventListener("click", () => change({ page: view.page - 1 }));
  byId("next").addEventListener("click", () => change({ page: view.page + 1 }));
  byId("last").addEventListener("click", () => change({ page: Infinity }));
  byId("page").addEventListener("change", (event) => change({ page: parseInt(event.target.value, 10) || 1 }));
  byId("size").addEventListener("change", (event) => change({ size: Number(event.target.value), page: 1 }));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select, textarea")) {
      // In a search field the browser would also empty it.
      if (event.key === "Escape") { event.preventDefault(); event.target.blur(); }
      return;
    }
    if (event.key === "/") { event.preventDefault(); byId("query").focus(); }
    else if (event.key === "ArrowLeft") byId("previous").click();
    else if (event.key === "ArrowRight") byId("next").click();
    else if (event.key === "r" || event.key === "R") openRandom();
  });
  window.addEventListener("hashchange", () => { recall(); select(); draw(); });
  recall();
  select();
  draw();
  document.documentElement.dataset.ready = "";
})();
