"use strict";
document.documentElement.classList.add("js");
document.addEventListener("DOMContentLoaded", () => {
  const tip = document.getElementById("tip");

  // Which cache and which bound is shown: one choice for all charts of a run.
  for (const run of document.querySelectorAll("article.run")) {
    const selects = [...run.querySelectorAll("select[data-axis]")];
    const show = () => {
      for (const axis of ["cache", "kind"]) {
        const chosen = selects.find((select) => select.dataset.axis === axis);
        for (const panel of run.querySelectorAll(`[data-panel][data-${axis}]`)) {
          // A panel hides only where one beside it is chosen: the headline has no uncertified cache.
          const beside = [...panel.parentElement.children].filter((one) => one.dataset.panel === panel.dataset.panel);
          const there = chosen && beside.some((one) => one.dataset[axis] === chosen.value);
          const wanted = there ? chosen.value : beside[0].dataset[axis];
          panel.classList.toggle("off", panel.dataset[axis] !== wanted);
        }
      }
    };
    for (const select of selects) {
      select.addEventListener("change", () => {
        const { top } = select.getBoundingClientRect();
        for (const other of selects) {
          if (other.dataset.axis !== select.dataset.axis) continue;
          if ([...other.options].some((option) => option.value === select.value)) other.value = select.value;
        }
        show();
        window.scrollBy({ top: select.getBoundingClientRect().top - top, behavior: "instant" });
      });
    }
    show();
  }

  // Hints: over a mark, or after a tap on it.
  const hide = () => { tip.hidden = true; };
  const hint = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    tip.style.left = `${Math.max(8, Math.min(width - box.width - 8, x - box.width / 2))}px`;
    tip.style.top = `${y - box.height - 14 < 4 ? y + 18 : y - box.height - 14}px`;
  };
  const point = (event) => {
    const mark = event.target.closest?.("[data-tip]");
    if (mark) hint(mark.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest?.(".heat-plot")) hide();
  };
  document.addEventListener("pointermove", point);
  document.addEventListener("pointerdown", point);
  document.addEventListener("scroll", hide, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  // A finger leaves with every tap; what it asked for stays.
  document.documentElement.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });

  // The heat map: the figures of the cell under the pointer or the keyboard's cursor.
  const figures = new WeakMap();
  const read = (holder) => {
    if (!figures.has(holder)) {
      const unpack = (packed) => {
        const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
        return new DataView(bytes.buffer);
      };
      const { rows, steps, columns, boundMax, boundMean, candidateMax } = holder.dataset;
      figures.set(holder, {
        rows: rows.split(" ").map((row) => row.split(":")), steps: Number(steps), columns: Number(columns),
        largest: unpack(boundMax), mean: unpack(boundMean), fast: unpack(candidateMax),
      });
    }
    return figures.get(holder);
  };
  const percent = (share) => {
    if (Number.isNaN(share)) return "none";
    if (!Number.isFinite(share)) return "infinite";
    const value = 100 * share;
    return `${value !== 0 && value < 1e-5 ? value.toExponential(2) : Number(value.toPrecision(3))} %`;
  };
  for (const plot of document.querySelectorAll(".heat-plot")) {
    const panel = plot.closest("[data-panel=heat]");
    const holder = panel.querySelector(".heat-data");
    const cursor = plot.querySelector(".cursor");
    const readout = panel.querySelector(".readout");
    let at = [0, 0];
    const show = (row, column, pointer) => {
      const data = read(holder);
      at = [Math.max(0, Math.min(data.rows.length - 1, row)), Math.max(0, Math.min(data.columns - 1, column))];
      const [layer, head] = data.rows[at[0]];
      const first = Math.ceil((at[1] * data.steps) / data.columns) + 1;
      const last = Math.max(first, Math.ceil(((at[1] + 1) * data.steps) / data.columns));
      const place = 4 * (at[0] * data.columns + at[1]);
      const text = `layer ${layer}, head ${head}, ${first === last ? `step ${first}` : `steps ${first}–${last}`}: ` +
        `largest bound ${percent(data.largest.getFloat32(place, true))}, mean ${percent(data.mean.getFloat32(place, true))}, ` +
        `fast path alone ${percent(data.fast.getFloat32(place, true))}`;
      Object.assign(cursor.style, {
        left: `${(100 * at[1]) / data.columns}%`, width: `${100 / data.columns}%`,
        top: `${(100 * at[0]) / data.rows.length}%`, height: `${100 / data.rows.length}%`,
      });
      cursor.hidden = false;
      readout.textContent = text;
      if (pointer) hint(text, pointer.clientX, pointer.clientY);
    };
    const under = (event) => {
      const box = plot.getBoundingClientRect();
      const data = read(holder);
      show(Math.floor(((event.clientY - box.top) / box.height) * data.rows.length),
        Math.floor(((event.clientX - box.left) / box.width) * data.columns), event);
    };
    plot.addEventListener("pointermove", under);
    plot.addEventListener("pointerdown", under);
    plot.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "mouse") return;
      cursor.hidden = true;
      hide();
    });
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(at[0], at[1]); });
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      show(at[0] + move[0], at[1] + move[1]);
    });
  }
});
