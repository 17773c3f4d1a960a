"use strict";

// The page of a feature: how its heat maps are shown, the value under the pointer, keys.
(() => {
  const modes = [...document.querySelectorAll("#heat input")];
  const fade = document.getElementById("fade"), under = document.getElementById("under");

  // Where a browser forbids storage to files, the choice lasts for one page.
  const stored = (key, value) => {
    try {
      if (value !== undefined) localStorage.setItem(key, value);
      return localStorage.getItem(key);
    } catch { return null; }
  };

  const choose = (mode) => { mode.checked = true; stored("vision_plugin.heat", mode.value); };
  const remembered = modes.find((mode) => mode.value === stored("vision_plugin.heat"));
  if (remembered) remembered.checked = true;
  for (const mode of modes) mode.addEventListener("change", () => choose(mode));

  const setFade = () => { document.body.style.setProperty("--fade", fade.value / 100); stored("vision_plugin.fade", fade.value); };
  if (fade) {
    fade.value = stored("vision_plugin.fade") ?? fade.value;
    fade.addEventListener("input", setFade);
    setFade();
  }

  // The grey of a heat map's pixel is the value: 255 stands for the scale of the feature.
  const levels = new WeakMap();
  const levelsOf = (image) => {
    if (!levels.has(image)) {
      const canvas = document.createElement("canvas");
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      const pen = canvas.getContext("2d", { willReadFrequently: true });
      pen.drawImage(image, 0, 0);
      levels.set(image, pen.getImageData(0, 0, canvas.width, canvas.height));
    }
    return levels.get(image);
  };

  const short = (value) => (value === 0 ? "0" : String(Number(value.toPrecision(2))));
  for (const frame of document.querySelectorAll(".frame[data-scale]")) {
    const heat = frame.querySelector(".heat");
    frame.addEventListener("pointermove", (event) => {
      const box = frame.getBoundingClientRect(), data = levelsOf(heat);
      const column = Math.min(data.width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * data.width)));
      const row = Math.min(data.height - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * data.height)));
      const value = (data.data[4 * (row * data.width + column)] / 255) * Number(frame.dataset.scale);
      const text = `${short(value)} at row ${row + 1}, column ${column + 1}`;
      frame.title = text;
      if (under) under.textContent = text;
    });
    frame.addEventListener("pointerleave", () => { if (under) under.textContent = "\u00a0"; });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const follow = { ArrowLeft: "previous", ArrowRight: "next", u: "up", U: "up" }[event.key];
    const onField = event.target.matches("input");
    if (follow && !(onField && event.key.startsWith("Arrow"))) document.getElementById(follow)?.click();
    if ((event.key === "h" || event.key === "H") && modes.length) choose(modes[(modes.findIndex((mode) => mode.checked) + 1) % modes.length]);
  });

  // Back to the index as this tab left it: sorted, filtered, selected.
  try {
    const view = sessionStorage.getItem("vision_plugin.index:" + new URL("..", location.href).pathname);
    if (view && view.startsWith("#")) document.getElementById("up").href = "../index.html" + view;
  } catch { /* storage is forbidden here: the index then opens as new */ }
})();
