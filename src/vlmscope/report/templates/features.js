"use strict";
(() => {
  const tables = JSON.parse(document.getElementById("tables").textContent);
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

  /** Draws the patches of one picture on a canvas over it; `levels` are 255ths of the example's peak. */
  const draw = holder => {
    if (holder.dataset.picture !== undefined && !holder.querySelector("img")) {
      const image = new Image();
      image.alt = "";
      image.src = tables.pictures[holder.dataset.picture];
      holder.append(image);
    }
    const boxes = tables.geometries[holder.dataset.geometry], levels = bytes(holder.dataset.levels);
    if (!boxes.length) return;
    const canvas = document.createElement("canvas"), ratio = holder.clientHeight / holder.clientWidth || 1;
    canvas.width = 272;
    canvas.height = Math.max(1, Math.round(272 * ratio));
    const pen = canvas.getContext("2d"), edge = (at, k) => boxes[4 * at + k] * (k % 2 ? canvas.height : canvas.width);
    const place = at => [edge(at, 0), edge(at, 1), edge(at, 2) - edge(at, 0), edge(at, 3) - edge(at, 1)].map(Math.round);
    let best = -1;
    levels.forEach((level, at) => {
      if (!level) return;
      pen.fillStyle = `rgba(255, 0, 200, ${(0.08 + 0.47 * level / 255).toFixed(3)})`;
      pen.fillRect(...place(at));
      if (best < 0 || level > levels[best]) best = at;
    });
    if (best >= 0 && "peak" in holder.dataset) {
      const [x, y, w, h] = place(best);
      pen.lineWidth = 9; pen.strokeStyle = "#000"; pen.strokeRect(x + 4.5, y + 4.5, w - 9, h - 9);
      pen.lineWidth = 4; pen.strokeStyle = "#fff"; pen.strokeRect(x + 4.5, y + 4.5, w - 9, h - 9);
    }
    holder.append(canvas);
  };
  const seen = new IntersectionObserver(entries => entries.forEach(entry => {
    if (!entry.isIntersecting) return;
    seen.unobserve(entry.target);
    draw(entry.target);
  }), { rootMargin: "400px" });
  document.querySelectorAll(".heated").forEach(holder => seen.observe(holder));
  // On paper there is no scrolling.
  addEventListener("beforeprint", () => document.querySelectorAll(".heated").forEach(holder => {
    if (!holder.querySelector("canvas")) { seen.unobserve(holder); draw(holder); }
  }));

  const toggles = document.querySelectorAll("[data-action=heat]");
  const heat = () => {
    const off = document.body.classList.toggle("no-heat");
    toggles.forEach(button => button.setAttribute("aria-pressed", String(!off)));
  };
  toggles.forEach(button => button.addEventListener("click", heat));

  const list = document.querySelector(".tiles"), form = document.querySelector(".filters");
  if (list && form) {
    const tiles = [...list.children].map(element => ({ element, ...element.dataset }));
    const count = document.getElementById("count"), none = document.getElementById("none");
    const number = value => value === "" || value === undefined ? -Infinity : Number(value);
    let sorted = "";
    const apply = () => {
      const wanted = Object.fromEntries(new FormData(form));
      const words = wanted.q.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const tile of tiles) {
        const fits = words.every(word => tile.words.includes(word)) &&
          (!wanted.layer || tile.layer === wanted.layer) && (!wanted.kind || tile.kind === wanted.kind) &&
          (!wanted.label || tile.label.split(" ").includes(wanted.label));
        tile.element.hidden = !fits;
        shown += fits;
      }
      if (wanted.sort !== sorted) {
        const [key, sign] = (sorted = wanted.sort).split(" ");
        const by = sign === "up" ? 1 : -1;
        tiles.sort((a, b) => by * (number(a[key]) - number(b[key])) || a.order - b.order);
        list.append(...tiles.map(tile => tile.element));
      }
      count.textContent = `${shown.toLocaleString("en")} of ${tiles.length.toLocaleString("en")} features`;
      none.hidden = shown > 0;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(apply));
    // A browser that goes back fills the form again after this script.
    addEventListener("pageshow", apply);
    apply();
  }

  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "h") heat();
    if (event.key === "/" && form) { event.preventDefault(); form.elements.q.focus(); }
  });
})();
