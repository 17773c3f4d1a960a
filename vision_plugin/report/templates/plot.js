"use strict";

// Points on a canvas: zoom, pan, a rectangle or a lasso, the nearest point under the pointer.
class Plot {
  // points: {x, y} arrays in 0..1 (NaN is not drawn); on: {pick(rows), hover(row), open(row), view()}
  constructor(canvas, on) {
    Object.assign(this, { canvas, on, points: { x: [], y: [] }, colour: () => "#888", chosen: null, marked: -1, drag: "rectangle", path: null });
    this.view = { x: 0.5, y: 0.5, zoom: 1 };
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", () => { this.path = null; this.draw(); });
    canvas.addEventListener("pointerleave", () => { if (!this.path) this.on.hover?.(-1); });
    addEventListener("resize", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  zooms() {
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), ...this.at(event));
    }, { passive: false });
  }

  zoom(factor, px, py) {
    const { w, h, side } = this.box(), before = this.view.zoom;
    const zoom = Math.min(Math.max(before * factor, 0.7), 200);
    const dx = ((px ?? w / 2) - w / 2) / side, dy = ((py ?? h / 2) - h / 2) / side;
    this.view = { x: this.view.x + dx / before - dx / zoom, y: this.view.y + dy / before - dy / zoom, zoom };
    this.changed();
  }

  changed() { this.draw(); this.on.view?.(); }

  box() {
    const w = this.canvas.clientWidth, h = this.canvas.clientHeight;
    return { w, h, side: Math.min(w, h) - 24, free: this.stretch };
  }

  // Place of a point on the canvas. A scatter fills it; a map keeps its proportions.
  to(row) {
    const { w, h, side } = this.box(), { x, y } = this.points;
    if (this.stretch) return [14 + x[row] * (w - 28), h - 14 - y[row] * (h - 28)];
    return [w / 2 + (x[row] - this.view.x) * side * this.view.zoom, h / 2 + (y[row] - this.view.y) * side * this.view.zoom];
  }

  draw() {
    const { canvas } = this, ratio = devicePixelRatio || 1, { w, h } = this.box();
    if (!w) return;
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const room = Math.sqrt((w * h) / (this.points.x.length + 1));
    const size = Math.min(9, Math.max(2.5, room / 6 * Math.sqrt(this.view.zoom)));
    const groups = new Map();
    for (let row = 0; row < this.points.x.length; row++) {
      const [x, y] = this.to(row);
      if (!(x > -9 && y > -9 && x < w + 9 && y < h + 9)) continue;
      const faint = this.chosen && !this.chosen(row), colour = this.colour(row);
      const key = faint ? `~${colour}` : colour;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(x, y);
    }
    for (const [key, places] of [...groups].sort(([a], [b]) => b.startsWith("~") - a.startsWith("~"))) {
      pen.globalAlpha = key.startsWith("~") ? 0.18 : 0.85;
      pen.fillStyle = key.replace("~", "");
      for (let i = 0; i < places.length; i += 2) pen.fillRect(places[i] - size / 2, places[i + 1] - size / 2, size, size);
    }
    pen.globalAlpha = 1;
    const ink = VP.dark() ? "#fff" : "#000";
    if (this.marked >= 0) {
      const [x, y] = this.to(this.marked);
      pen.strokeStyle = ink;
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(x, y, size + 4, 0, 7);
      pen.stroke();
    }
    if (this.path && this.drag !== "pan") {
      pen.strokeStyle = ink;
      pen.setLineDash([4, 3]);
      pen.beginPath();
      for (const [x, y] of this.outline()) pen.lineTo(x, y);
      pen.closePath();
      pen.stroke();
    }
  }

  outline() {
    if (this.drag !== "rectangle") return this.path;
    const [[a, b], [c, d]] = [this.path[0], this.path.at(-1)];
    return [[a, b], [c, b], [c, d], [a, d]];
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  nearest(px, py, within = 14) {
    let best = -1, least = within * within;
    for (let row = 0; row < this.points.x.length; row++) {
      const [x, y] = this.to(row), d = (x - px) ** 2 + (y - py) ** 2;
      if (d < least) [best, least] = [row, d];
    }
    return best;
  }

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.path = [this.at(event)];
    this.from = { ...this.view };
  }

  move(event) {
    const here = this.at(event);
    if (!this.path) { this.on.hover?.(this.nearest(...here)); return; }
    this.path.push(here);
    if (this.drag === "pan") {
      const { side } = this.box(), [x, y] = this.path[0];
      this.view = { ...this.from, x: this.from.x - (here[0] - x) / side / this.from.zoom, y: this.from.y - (here[1] - y) / side / this.from.zoom };
      this.changed();
    } else this.draw();
  }

  up(event) {
    if (!this.path) return;
    const here = this.at(event), [x, y] = this.path[0], moved = Math.hypot(here[0] - x, here[1] - y) > 5 || this.path.length > 8;
    const outline = this.outline();
    this.path = null;
    if (!moved) this.on.open?.(this.nearest(...here), event);
    else if (this.drag === "rectangle") this.on.pick?.(outline, event);
    else if (this.drag === "lasso") this.on.pick?.(this.inside(outline), event);
    this.draw();
  }

  // Rows inside a closed line.
  inside(outline) {
    const found = [];
    for (let row = 0; row < this.points.x.length; row++) {
      const [x, y] = this.to(row);
      let is = false;
      for (let i = 0, j = outline.length - 1; i < outline.length; j = i++) {
        const [ax, ay] = outline[i], [bx, by] = outline[j];
        if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) is = !is;
      }
      if (is) found.push(row);
    }
    return found;
  }
}
