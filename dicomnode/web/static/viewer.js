// Pictures and slices: one scale, one palette and one choice of before and after for all of them.
"use strict";

(() => {
  const PALETTES = ["inverse", "grey", "hot"];
  const state = { show: "both", palette: "inverse", top: null, side: "after" };
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // An image takes a new address when its bytes are there, so nothing flickers; the last address asked for wins.
  function put(image, address) {
    if (image.dataset.wanted === address) return;
    image.dataset.wanted = address;
    const ahead = new Image();
    ahead.onload = () => { if (image.dataset.wanted === address) image.setAttribute("href", address); };
    ahead.src = address;
  }
  const later = (wait, act) => {
    let timer;
    return (...given) => { clearTimeout(timer); timer = setTimeout(() => act(...given), wait); };
  };
  const neat = (value) => Number(value.toPrecision(3));

  // --- projections

  function pictures() {
    const form = document.querySelector("[data-display]");
    const mips = document.querySelector("[data-mips]");
    if (!form || !mips || form.dataset.ready) return;
    form.dataset.ready = "yes";
    const number = form.elements.top;
    const dial = form.querySelector("[data-top]");
    const usual = Number(mips.dataset.usual);
    const turner = mips.querySelector("[data-turns]");
    const fromDial = (at) => neat(usual * 10 ** ((at - 50) / 50));
    const toDial = (top) => 50 + 50 * Math.log10(top / usual);
    form.querySelectorAll("[hidden]:not([data-scale])").forEach((one) => { one.hidden = false; });
    if (turner) {
      turner.hidden = false;
      turner.querySelector("[data-play]").hidden = still.matches;
    }
    state.top ??= Number(number.value);
    state.palette = form.elements.palette.value = state.chosen ?? form.elements.palette.value;

    function address(image) {
      let source = image.dataset.src;
      if (turner) source = source.replace(/\/turn\/(\w+)\/\d+\.png/, `/turn/$1/${turner.querySelector("input").value}.png`);
      return `${source}&top=${state.top}&palette=${state.palette}`;
    }
    function draw() {
      number.value = state.top;
      dial.value = toDial(state.top);
      dial.setAttribute("aria-valuetext", String(state.top));
      form.elements.palette.value = state.palette;
      form.elements.show.value = state.show;
      mips.classList.toggle("show-before", state.show === "before");
      mips.classList.toggle("show-after", state.show === "after");
      mips.classList.toggle("dark", state.palette !== "inverse");
      form.querySelectorAll("[data-scale]").forEach((bar) => {
        bar.hidden = bar.dataset.scale !== state.palette;
        const texts = bar.querySelectorAll(".tick");
        [0, state.top / 2, state.top].forEach((value, k) => { texts[k].textContent = String(Number(value.toPrecision(4))); });
      });
      mips.querySelectorAll("image[data-src]").forEach((image) => put(image, address(image)));
    }
    state.draw = draw;
    const soon = later(60, draw);
    dial.addEventListener("input", () => { state.top = fromDial(Number(dial.value)); soon(); });
    number.addEventListener("change", () => { if (Number(number.value) > 0) { state.top = Number(number.value); draw(); } });
    form.elements.palette.addEventListener("change", () => { state.palette = state.chosen = form.elements.palette.value; draw(); });
    form.elements.show.forEach((one) => one.addEventListener("change", () => { state.show = form.elements.show.value; draw(); }));
    form.querySelector("[data-flip]").addEventListener("click", flip);
    form.addEventListener("submit", (event) => { event.preventDefault(); number.dispatchEvent(new Event("change")); });
    if (turner) turning(turner, draw, address, mips);
    draw();
  }

  function flip() {
    state.show = state.show === "before" ? "after" : "before";
    state.draw?.();
    state.slices?.flip(state.show);
  }

  function turning(turner, draw, address, mips) {
    const dial = turner.querySelector("input");
    const play = turner.querySelector("[data-play]");
    let timer = null;
    dial.addEventListener("input", draw);
    function ahead() {
      const now = dial.value;
      for (let k = 0; k < Number(turner.dataset.turns); k++) {
        dial.value = k;
        mips.querySelectorAll("image[data-src*='/turn/']").forEach((image) => { new Image().src = address(image); });
      }
      dial.value = now;
    }
    function stop() { clearInterval(timer); timer = null; play.textContent = "▶ Turn"; play.setAttribute("aria-pressed", "false"); }
    state.turn = () => {
      if (timer) { stop(); return; }
      if (still.matches) return;
      ahead();
      play.textContent = "❚❚ Stop";
      play.setAttribute("aria-pressed", "true");
      timer = setInterval(() => {
        if (!document.contains(dial)) { stop(); return; }
        dial.value = (Number(dial.value) + 1) % Number(turner.dataset.turns);
        draw();
      }, 140);
    };
    play.addEventListener("click", state.turn);
  }

  // --- slices

  class Slices {
    constructor(box) {
      const one = (name) => box.querySelector(name);
      this.box = box;
      this.stage = one("[data-stage]");
      this.images = [...this.stage.querySelectorAll("image")];
      this.slice = one("[data-slice]");
      this.split = one("[data-split]");
      this.top = one("[data-slice-top]");
      this.palette = one("[data-palette]");
      this.readout = one("#readout");
      this.planes = Object.fromEntries(JSON.parse(box.dataset.planes).map((plane) => [plane.plane, plane]));
      this.at = JSON.parse(box.dataset.start);
      this.missing = box.dataset.missing.split(" ");
      this.place = null;
      this.palette.value = state.palette;
      if (state.top) this.top.value = state.top;
      this.plane = this.planes.axial;
      this.listen();
      this.turnTo("axial");
      box.dataset.ready = "yes";
    }

    listen() {
      this.box.querySelectorAll("[name=plane]").forEach((one) => one.addEventListener("change", () => this.turnTo(one.value)));
      this.slice.addEventListener("input", () => this.go(Number(this.slice.value)));
      this.split.addEventListener("input", () => this.divide(Number(this.split.value)));
      this.palette.addEventListener("change", () => this.draw());
      this.top.addEventListener("change", () => this.draw());
      this.box.querySelector("[data-smooth]").addEventListener("change", (event) => this.stage.classList.toggle("exact", !event.target.checked));
      this.stage.addEventListener("wheel", (event) => { event.preventDefault(); this.go(this.at[this.plane.plane] + Math.sign(event.deltaY)); }, { passive: false });
      this.stage.addEventListener("keydown", (event) => this.key(event));
      this.stage.addEventListener("pointerdown", (event) => { this.stage.setPointerCapture(event.pointerId); this.held = [event.clientX, event.clientY]; this.moved = false; });
      this.stage.addEventListener("pointermove", (event) => this.pointed(event));
      this.stage.addEventListener("pointerup", (event) => { if (this.held && !this.moved) this.mark(this.mm(event)); this.held = null; });
      this.stage.addEventListener("pointercancel", () => { this.held = null; });
      this.ask = later(40, (place) => this.read(place));
    }

    key(event) {
      const step = { ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
      const part = { ArrowLeft: -5, ArrowRight: 5 }[event.key];
      if (step) this.go(this.at[this.plane.plane] + step);
      else if (part) this.divide(Number(this.split.value) + part);
      else if (event.key === "Home") this.go(0);
      else if (event.key === "End") this.go(this.plane.slices - 1);
      else if ("123".includes(event.key)) this.turnTo(["axial", "coronal", "sagittal"][Number(event.key) - 1]);
      else return;
      event.preventDefault();
    }

    turnTo(name) {
      this.plane = this.planes[name];
      this.box.querySelector(`[name=plane][value=${name}]`).checked = true;
      const { width, height, slices } = this.plane;
      this.stage.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.images.forEach((image) => { image.setAttribute("width", width); image.setAttribute("height", height); });
      this.slice.max = slices - 1;
      const px = Math.max(width / 620, height / 620);
      this.px = px;
      const [left, right, before, after] = ["left", "right", "before", "after"].map((side) => this.stage.querySelector(`[data-side=${side}]`));
      const put = (text, words, x, y) => { text.textContent = words; text.setAttribute("x", x); text.setAttribute("y", y); text.setAttribute("font-size", 13 * px); };
      put(left, name === "sagittal" ? "A" : "R", 6 * px, 18 * px);
      put(right, name === "sagittal" ? "P" : "L", width - 6 * px, 18 * px);
      put(before, this.missing.includes("before") ? "" : "before", 6 * px, height - 8 * px);
      put(after, this.missing.includes("after") ? "" : "after", width - 6 * px, height - 8 * px);
      const long = width > 250 ? 100 : 20;
      const ruler = this.stage.querySelector("path.ruler");
      ruler.setAttribute("d", `M${0.7 * width - long / 2} ${height - 8 * px}h${long}`);
      ruler.setAttribute("stroke-width", 2.5 * px);
      const text = this.stage.querySelector("text.ruler");
      text.setAttribute("text-anchor", "middle");
      put(text, `${long / 10} cm`, 0.7 * width, height - 13 * px);
      this.divide(Number(this.split.value));
      this.go(this.at[name]);
    }

    go(number) {
      const plane = this.plane;
      this.at[plane.plane] = Math.min(Math.max(Math.round(number), 0), plane.slices - 1);
      this.draw();
    }

    draw() {
      const plane = this.plane;
      const at = this.at[plane.plane];
      this.slice.value = at;
      const axis = { axial: 2, coronal: 1, sagittal: 0 }[plane.plane];
      const middle = (plane.right[axis] * plane.width + plane.down[axis] * plane.height) / 2;  // an oblique slice is aslant
      const mm = plane.corner[axis] + middle + plane.step[axis] * at;
      const said = `${at + 1} of ${plane.slices}, ${"xyz"[axis]} = ${mm.toFixed(1)} mm`;
      this.box.querySelector("[data-slice-said]").textContent = said;
      this.slice.setAttribute("aria-valuetext", said);
      const top = Number(this.top.value) > 0 ? Number(this.top.value) : Number(this.box.dataset.top);
      this.stage.classList.toggle("dark", this.palette.value !== "inverse");
      for (const image of this.images) {
        if (this.missing.includes(image.dataset.when)) continue;
        put(image, this.address(image.dataset.when, at, top));
      }
      for (const next of [at + 1, at - 1]) {
        if (next < 0 || next >= plane.slices) continue;
        for (const when of ["before", "after"]) if (!this.missing.includes(when)) new Image().src = this.address(when, next, top);
      }
      this.cross();
    }

    address(when, at, top) {
      const number = when === "before" ? at - at % 2 : at;  // both fine slices of a source slice show the same
      return `${this.box.dataset.base}/slice/${when}/${this.plane.plane}/${number}.png?v=${this.box.dataset.version}&top=${top}&palette=${this.palette.value}`;
    }

    divide(percent) {
      const share = Math.min(Math.max(percent, 0), 100);
      this.split.value = share;
      const x = this.plane.width * share / 100;
      const rect = this.stage.querySelector("clipPath rect");
      rect.setAttribute("width", x);
      rect.setAttribute("height", this.plane.height);
      for (const [name, width] of [["shade", 4], ["line", 2]]) {
        const line = this.stage.querySelector(`.divider .${name}`);
        line.setAttribute("d", `M${x} 0V${this.plane.height}`);
        line.setAttribute("stroke-width", width * this.px);
      }
      this.box.querySelector("[data-split-said]").textContent = share === 0 ? "all after" : share === 100 ? "all before" : `${Math.round(share)} % before`;
    }

    flip(side) { this.divide(side === "before" ? 100 : 0); }

    // The place in mm (LPS) under the pointer.
    mm(event) {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.stage.getScreenCTM().inverse());
      const { width, height, corner, right, down, step, plane } = this.plane;
      if (point.x < 0 || point.y < 0 || point.x >= width || point.y >= height) return null;
      return [0, 1, 2].map((k) => corner[k] + right[k] * point.x + down[k] * point.y + step[k] * this.at[plane]);
    }

    pointed(event) {
      if (this.held) {
        const far = Math.hypot(event.clientX - this.held[0], event.clientY - this.held[1]);
        if (far > 4) this.moved = true;
        if (this.moved) {
          const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.stage.getScreenCTM().inverse());
          this.divide(100 * point.x / this.plane.width);
        }
        return;
      }
      const place = this.mm(event);
      if (place) this.ask(place);
    }

    async read(place) {
      const [x, y, z] = place.map((value) => value.toFixed(3));
      const answer = await fetch(`${this.box.dataset.base}/value?x=${x}&y=${y}&z=${z}`);
      if (!answer.ok) return;
      const found = await answer.json();
      const side = (value, names) => `${names[value >= 0 ? 1 : 0]} ${Math.abs(value).toFixed(1)}`;
      this.readout.replaceChildren();
      const line = (head, text) => {
        const row = document.createElement("div");
        const bold = document.createElement("b");
        bold.textContent = head;
        row.append(bold, ` ${text}`);
        this.readout.append(row);
      };
      for (const when of ["before", "after"]) {
        if (found[when]) line(when, `${found[when].value.toPrecision(4)} ${found.unit}`);
      }
      line("place", `${side(place[0], "RL")}, ${side(place[1], "AP")}, ${side(place[2], "FH")} mm`);
    }

    // Mark a place: all planes go there.
    mark(place) {
      if (!place) return;
      this.place = place;
      for (const [name, plane] of Object.entries(this.planes)) {
        const along = plane.step.reduce((sum, s, k) => sum + s * (place[k] - plane.corner[k]), 0);
        const long = plane.step.reduce((sum, s) => sum + s * s, 0);
        this.at[name] = Math.min(Math.max(Math.round(along / long), 0), plane.slices - 1);
      }
      this.draw();
      this.read(place);
    }

    cross() {
      const path = this.stage.querySelector(".cross");
      if (!this.place) return;
      const dot = (a) => a.reduce((sum, s, k) => sum + s * (this.place[k] - this.plane.corner[k]), 0);
      const [x, y, size] = [dot(this.plane.right), dot(this.plane.down), 14 * this.px];
      path.setAttribute("stroke-width", 1.5 * this.px);
      path.setAttribute("d", `M${x - size} ${y}h${size * 0.6}M${x + size * 0.4} ${y}h${size * 0.6}M${x} ${y - size}v${size * 0.6}M${x} ${y + size * 0.4}v${size * 0.6}`);
    }
  }

  function slices() {
    const box = document.querySelector("[data-viewer]");
    if (!box || box.dataset.ready) return;
    state.slices = new Slices(box);
    if (state.wanted) { state.slices.mark(state.wanted); state.wanted = null; }
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-place]");
    if (!link) return;
    const place = link.dataset.place.split(",").map(Number);
    if (state.slices && document.contains(state.slices.box)) state.slices.mark(place);
    else state.wanted = place;
  });
  document.addEventListener("study:key", (event) => {
    const grow = { "+": 1.25, "-": 0.8, "−": 0.8 }[event.detail];
    const inside = document.activeElement?.closest("[data-viewer]") && state.slices;
    const picture = document.querySelector("[data-mips]");
    if (event.detail === " " || event.detail.toLowerCase() === "b") flip();
    else if (event.detail.toLowerCase() === "p" && state.turn) state.turn();
    else if (grow && inside) { state.slices.top.value = neat(state.slices.top.value * grow); state.slices.draw(); }
    else if (grow && picture) { state.top = neat(state.top * grow); state.draw(); }
    else if (event.detail.toLowerCase() === "i" && picture) {
      state.palette = state.chosen = PALETTES[(PALETTES.indexOf(state.palette) + 1) % PALETTES.length];
      state.draw();
      if (state.slices) { state.slices.palette.value = state.palette; state.slices.draw(); }
    } else return;
    event.preventDefault();
  });
  document.addEventListener("htmx:load", () => { pictures(); slices(); });
  pictures();
  slices();
})();
