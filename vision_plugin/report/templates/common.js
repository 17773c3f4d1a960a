"use strict";

// Parts that several pages share. Everything that is text is set as text, never as markup.
const VP = (() => {
  const byId = (id) => document.getElementById(id);

  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  };

  const shape = (tag, attributes = {}, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  const isolated = (text) => element("bdi", {}, text);

  // ---------------------------------------------------------------- numbers

  const format = (value, kind) => {
    if (value === null || Number.isNaN(value)) return "–";
    if (kind === "share") {
      const percent = value * 100;
      return (percent >= 10 || percent === 0 ? percent.toFixed(percent === 0 ? 0 : 1) : percent.toPrecision(2)) + "%";
    }
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
  };

  const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

  // ---------------------------------------------------------------- images

  // A small copy of an image: a part of a sheet, scaled by the style sheet's size of the box.
  const thumb = (report, slot, className = "thumb") => {
    const { tile, across, suffix, sizes } = report.thumbs;
    const [width, height] = sizes[slot];
    const made = element("span", { class: className });
    if (!width) return made;
    const place = slot % (across * across), x = (place % across) * tile, y = Math.floor(place / across) * tile;
    const sheet = tile * across;
    made.style.backgroundImage = `url("thumbs/${Math.floor(slot / (across * across))}.${suffix}")`;
    // Percentages refer to the box: the image's longer side fills it.
    const side = Math.max(width, height);
    made.style.backgroundSize = `${(100 * sheet) / side}%`;
    made.style.backgroundPosition = `${(100 * x) / (sheet - side)}% ${(100 * y) / (sheet - side)}%`;
    return made;
  };

  // ---------------------------------------------------------------- state, kept in the address

  const readHash = () => new URLSearchParams(location.hash.slice(1));

  const writeHash = (pairs) => {
    const hash = new URLSearchParams(pairs).toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  };

  const stored = (key, value) => {
    // Where a browser forbids storage to files, choices last for one page.
    try {
      if (value !== undefined) sessionStorage.setItem(key, value);
      return sessionStorage.getItem(key);
    } catch { return null; }
  };

  // ---------------------------------------------------------------- selection

  const listOf = (ids) => [...ids].sort((a, b) => a - b).join(" ");

  const copy = async (field, told) => {
    field.focus();
    field.select();
    let done = false;
    try {
      await navigator.clipboard.writeText(field.value);
      done = true;
    } catch {
      done = document.execCommand("copy");
    }
    told.textContent = done ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { told.textContent = ""; }, 3000);
  };

  const typing = (event) => event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox]):not([type=radio]), select, textarea");

  const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;

  return { byId, element, shape, isolated, format, count, thumb, readHash, writeHash, stored, listOf, copy, typing, dark };
})();
