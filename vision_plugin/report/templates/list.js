"use strict";

// A list of any length that has elements for what can be seen alone. The window scrolls it.
class VirtualList {
  // layout() -> {width, height, across, gap}; make(row, place) -> element.
  constructor(root, { layout, make }) {
    Object.assign(this, { root, layout, make, order: [], shown: new Map(), start: 0 });
    const later = () => this.draw();
    addEventListener("scroll", later, { passive: true });
    addEventListener("resize", () => this.redraw());
  }

  setOrder(order) { this.order = order; this.redraw(); }

  redraw() {
    for (const element of this.shown.values()) element.remove();
    this.shown.clear();
    this.size = this.layout();
    this.across = Math.max(1, this.size.across);
    this.lines = Math.ceil(this.order.length / this.across);
    this.root.style.height = `${this.lines * this.size.height}px`;
    this.draw();
  }

  draw() {
    const { height } = this.size;
    const top = this.root.getBoundingClientRect().top, more = innerHeight;
    const first = Math.max(0, Math.floor((-top - more) / height));
    const last = Math.min(this.lines, Math.ceil((innerHeight - top + more) / height));
    for (const [place, element] of this.shown) {
      const line = Math.floor(place / this.across);
      if (line < first || line >= last) {
        if (element.contains(document.activeElement)) continue;
        element.remove();
        this.shown.delete(place);
      }
    }
    const made = document.createDocumentFragment();
    for (let place = first * this.across; place < Math.min(last * this.across, this.order.length); place++) {
      if (!this.shown.has(place)) made.append(this.place(place));
    }
    this.root.append(made);
  }

  place(place) {
    const { width, height, gap } = this.size, element = this.make(this.order[place], place);
    element.classList.add("item");
    element.dataset.place = place;
    element.style.left = `${(place % this.across) * (width + gap)}px`;
    element.style.top = `${Math.floor(place / this.across) * height}px`;
    element.style.width = `${width}px`;
    element.style.height = `${height - gap}px`;
    this.shown.set(place, element);
    return element;
  }

  // Show a place and put the focus on its link.
  focus(place) {
    if (this.order.length === 0) return;
    const to = Math.min(Math.max(place, 0), this.order.length - 1);
    const y = this.root.getBoundingClientRect().top + scrollY + Math.floor(to / this.across) * this.size.height;
    if (y < scrollY + 60 || y + this.size.height > scrollY + innerHeight) scrollTo({ top: y - innerHeight / 3 });
    this.draw();
    const element = this.shown.get(to);
    (element.querySelector("a") ?? element).focus({ preventScroll: true });
  }
}
