"use strict";

// Images patch by patch. What fires comes in a script per few images, when one is opened.
const receivePatches = (found) => { for (const [number, one] of Object.entries(found)) ImagePage.received.set(Number(number), one); };

const ImagePage = (() => {
  const { byId, element, isolated, thumb } = VP;
  const { report } = Columns;
  const { numbers: listed, script, rows: gridRows, columns: gridColumns } = byId("main").dataset;
  const numbers = listed ? listed.split(" ").map(Number) : [];
  const rows = Number(gridRows), columns = Number(gridColumns), perScript = Number(script);
  const slots = new Map(report.pictures.numbers.map((number, slot) => [number, slot]));
  const received = new Map(), asked = new Map();
  let now = -1, patch = -1, shown = null;

  const load = (place) => {
    const file = Math.floor(place / perScript);
    if (!asked.has(file)) {
      asked.set(file, new Promise((done, failed) => {
        const made = element("script", { src: `patches/${file}.js` });
        made.addEventListener("load", done);
        made.addEventListener("error", failed);
        document.head.append(made);
      }));
    }
    return asked.get(file);
  };

  const nameOf = (row) => (report.names && report.names[row]) || Columns.commonest(row)?.text || "";

  const entry = (id, value, onPoint) => {
    const row = Columns.rowOf.get(id);
    const made = element("li", {}, element("a", { href: `features/${id}.html` }, String(id)), element("span", { class: "what quiet" }, isolated(row === undefined ? "" : nameOf(row))));
    if (row !== undefined) made.append(...report.images[row].slice(0, 3).map((slot) => thumb(report, slot)));
    made.append(element("span", { class: "number" }, VP.format(value, "number")));
    if (onPoint) for (const [on, off] of [["pointerenter", "pointerleave"], ["focusin", "focusout"]]) {
      made.addEventListener(on, onPoint);
      made.addEventListener(off, () => overlay(null));
    }
    return made;
  };

  // Levels 0..255 of a feature at the patches, or null for the image alone.
  const overlay = (levels) => {
    shown = levels;
    const canvas = byId("heat-now");
    if (!canvas) return;
    const pen = canvas.getContext("2d"), fade = byId("fade").value / 100;
    const picture = pen.createImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const level = levels ? 255 * (1 - fade) + levels[i] * fade : 255;
      picture.data.set([level, level, level, 255], 4 * i);
    }
    pen.putImageData(picture, 0, 0);
  };

  const unpack = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  const choosePatch = (place) => {
    const one = received.get(now);
    patch = place;
    const cursor = byId("cursor");
    cursor.hidden = place < 0;
    if (place < 0) { byId("at-patch").replaceChildren(); byId("patch-title").textContent = "At a patch"; byId("patch-note").hidden = false; return; }
    const row = Math.floor(place / columns), column = place % columns;
    cursor.style.left = `${(100 * column) / columns}%`;
    cursor.style.top = `${(100 * row) / rows}%`;
    cursor.style.width = `${100 / columns}%`;
    cursor.style.height = `${100 / rows}%`;
    byId("patch-title").textContent = `Row ${row + 1}, column ${column + 1}`;
    const found = one.latents[place];
    byId("patch-note").hidden = found.length > 0;
    byId("patch-note").textContent = found.length ? "" : "No feature fires here.";
    const maps = new Map(one.summed.map(([id], i) => [id, one.maps[i]]));
    byId("at-patch").replaceChildren(...found.map((id, i) => entry(id, one.values[place][i], maps.has(id) ? () => overlay(unpack(maps.get(id))) : null)));
    remember();
  };

  const patchAt = (event) => {
    const box = byId("stage").getBoundingClientRect();
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    return Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows))) * columns + column;
  };

  const open = async (number, at = -1) => {
    const place = numbers.indexOf(number);
    if (place < 0) return close();
    await load(place);
    const one = received.get(number);
    now = number;
    byId("one").hidden = false;
    byId("one-title").replaceChildren(`Image ${number}`, " ", element("bdi", { class: "quiet" }, report.pictures.labels[slots.get(number)] || one.id));
    const [source, x, y, width, height, sheet] = one.tile;
    const picture = VP.shape("svg", { class: "image", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": one.id },
      VP.shape("image", { href: source, x: -x, y: -y, width: sheet, height: sheet }));
    byId("stage").replaceChildren(picture, element("canvas", { id: "heat-now", width: columns, height: rows }), element("span", { class: "cursor", id: "cursor" }));
    byId("texts").replaceChildren(...one.texts.flatMap(([name, text]) => [element("dt", {}, isolated(name)), element("dd", {}, isolated(text))]));
    byId("over-image").replaceChildren(...one.summed.map(([id, sum], i) => entry(id, sum, () => overlay(unpack(one.maps[i])))));
    overlay(null);
    choosePatch(at);
    byId("previous").disabled = place === 0;
    byId("next").disabled = place === numbers.length - 1;
    for (const button of byId("all").querySelectorAll("button")) {
      if (Number(button.dataset.number) === number) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
    }
    remember();
    document.documentElement.dataset.image = number;
  };

  const close = () => { now = -1; byId("one").hidden = true; };

  const remember = () => {
    const pairs = now < 0 ? [] : [["image", now]];
    if (now >= 0 && patch >= 0) pairs.push(["patch", patch]);
    if (byId("query").value.trim()) pairs.push(["query", byId("query").value]);
    VP.writeHash(pairs);
  };

  const drawAll = () => {
    const words = byId("query").value.trim().toLocaleLowerCase(), fit = words ? Columns.picturesWith(words) : null;
    const fits = (number) => !words || String(number) === words.replace("#", "") || fit[slots.get(number)] > 0;
    const found = numbers.filter(fits);
    byId("count").textContent = found.length === numbers.length ? VP.count(found.length, "image") : `${found.length.toLocaleString("en")} of ${VP.count(numbers.length, "image")}`;
    byId("all").replaceChildren(...found.map((number) => {
      const label = report.pictures.labels[slots.get(number)];
      const button = element("button", { type: "button", "data-number": number, "aria-label": `Image ${number}${label ? `: ${label}` : ""}`, title: label || undefined }, thumb(report, slots.get(number)));
      if (number === now) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => open(number));
      return element("li", {}, button);
    }));
  };

  const recall = () => {
    const said = VP.readHash();
    byId("query").value = said.get("query") ?? "";
    drawAll();
    const number = said.has("image") ? Number(said.get("image")) : numbers[0] ?? -1;
    return open(number, said.has("patch") ? Math.min(rows * columns - 1, Math.max(-1, Number(said.get("patch")) || 0)) : -1);
  };

  const go = (by) => { const to = numbers[numbers.indexOf(now) + by]; if (to !== undefined) open(to); };

  const begin = () => {
    byId("stage").addEventListener("click", (event) => choosePatch(patchAt(event)));
    byId("stage").addEventListener("pointermove", (event) => {
      const at = patchAt(event), one = received.get(now);
      const first = one.latents[at][0];
      byId("under").textContent = first === undefined ? "no feature" : `feature ${first}: ${VP.format(one.values[at][0], "number")}`;
    });
    byId("stage").addEventListener("pointerleave", () => { byId("under").textContent = "\u00a0"; });
    byId("stage").addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
      if (!by) return;
      event.preventDefault();
      const to = patch < 0 ? 0 : patch + by;
      if (to >= 0 && to < rows * columns) choosePatch(to);
    });
    byId("fade").addEventListener("input", () => overlay(shown));
    byId("query").addEventListener("input", () => { drawAll(); remember(); });
    byId("previous").addEventListener("click", () => go(-1));
    byId("next").addEventListener("click", () => go(1));
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !VP.typing(event)) { event.preventDefault(); byId("query").focus(); return; }
      if (VP.typing(event) || event.target.closest("#stage")) return;
      if (event.key === "ArrowLeft") go(-1); else if (event.key === "ArrowRight") go(1);
    });
    addEventListener("hashchange", recall);
    recall().then(() => { document.documentElement.dataset.ready = ""; });
  };

  return { received, begin };
})();

ImagePage.begin();
