"use strict";

(() => {
  const modes = [...document.querySelectorAll("#heat input")];
  const key = "vision_plugin.heat";

  // Where a browser forbids storage to files, the choice lasts for one page.
  const stored = (value) => {
    try {
      if (value !== undefined) localStorage.setItem(key, value);
      return localStorage.getItem(key);
    } catch { return null; }
  };

  const choose = (mode) => { mode.checked = true; stored(mode.value); };

  const remembered = modes.find((mode) => mode.value === stored());
  if (remembered) remembered.checked = true;
  for (const mode of modes) mode.addEventListener("change", () => choose(mode));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const follow = { ArrowLeft: "previous", ArrowRight: "next", u: "up", U: "up" }[event.key];
    const onRadio = event.target.matches("input");
    if (follow && !(onRadio && event.key.startsWith("Arrow"))) document.getElementById(follow)?.click();
    if ((event.key === "h" || event.key === "H") && modes.length) {
      choose(modes[(modes.findIndex((mode) => mode.checked) + 1) % modes.length]);
    }
  });

  // Back to the index as this tab left it: sorted, filtered, at its page.
  try {
    const view = sessionStorage.getItem("vision_plugin.index:" + new URL("..", location.href).pathname);
    if (view && view.startsWith("#")) document.getElementById("up").href = "../index.html" + view;
  } catch { /* storage is forbidden here: the index then opens as new */ }
})();
