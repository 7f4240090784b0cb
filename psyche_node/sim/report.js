"use strict";
// The pointer's answers, the theme and the copying of addresses. The page is complete without this script.
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const charts = JSON.parse(document.getElementById("data").textContent);
  const tip = document.querySelector(".tip");

  const show = (event, title, lines) => {
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = title;
    tip.append(head);
    for (const [name, value] of lines) {
      const line = document.createElement("span");
      const left = document.createElement("em");
      left.style.fontStyle = "normal";
      left.textContent = name;
      const right = document.createElement("span");
      right.textContent = value;
      line.append(left, right);
      tip.append(line);
    }
    const box = tip.getBoundingClientRect();
    const right = event.clientX + 16 + box.width > innerWidth;
    tip.style.left = `${right ? event.clientX - 16 - box.width : event.clientX + 16}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - box.height - 8)}px`;
    tip.style.visibility = "visible";
  };

  const place = (svg, event) => {
    const box = svg.getBoundingClientRect();
    const view = svg.viewBox.baseVal;
    return [((event.clientX - box.left) / box.width) * view.width, ((event.clientY - box.top) / box.height) * view.height];
  };

  const nearest = (list, wanted) => {
    let best = -1;
    for (let index = 0; index < list.length; index += 1) {
      if (best < 0 || Math.abs(list[index] - wanted) < Math.abs(list[best] - wanted)) best = index;
    }
    return best;
  };

  const line = (svg, data) => {
    const guide = svg.querySelector(".guide");
    svg.addEventListener("pointermove", (event) => {
      const [x] = place(svg, event);
      const share = Math.min(1, Math.max(0, (x - data.x0) / (data.x1 - data.x0)));
      const round = Math.round(share * data.rounds);
      const at = data.x0 + (round / data.rounds) * (data.x1 - data.x0);
      guide.setAttribute("x1", at);
      guide.setAttribute("x2", at);
      guide.style.visibility = "visible";
      const lines = [];
      for (const series of data.series) {
        const index = nearest(series.x, round);
        if (index >= 0) lines.push([series.label, series.text[index]]);
      }
      show(event, `${data.unit} ${round}`, lines);
    });
    svg.addEventListener("pointerleave", () => { guide.style.visibility = "hidden"; });
  };

  const words = {
    i: "included", c: "committed, not included", t: "trained, not on chain", m: "missed", v: "round void", ".": "not active",
  };

  const grid = (svg, data) => {
    const cursor = svg.querySelector(".cursor");
    const where = (event) => {
      const [x, y] = place(svg, event);
      const clamp = (value, top) => Math.min(top, Math.max(0, value));
      return [clamp(Math.floor((x / data.width) * data.rounds), data.rounds - 1),
        clamp(Math.floor((y - data.top) / data.row), data.names.length - 1)];
    };
    svg.addEventListener("pointermove", (event) => {
      const [round, row] = where(event);
      cursor.setAttribute("x", (round / data.rounds) * data.width);
      cursor.style.visibility = "visible";
      show(event, `round ${round}`, [[data.names[row], words[data.states[row][round]]]]);
    });
    svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; });
    svg.addEventListener("click", (event) => {
      const lanes = document.querySelector('[data-chart="lanes"]');
      const box = lanes && lanes.parentElement;
      const found = charts.lanes && charts.lanes.rounds.find((entry) => entry[0] === where(event)[0]);
      if (!box || !found) return;
      const span = charts.lanes.last - charts.lanes.first;
      const share = (found[1] - charts.lanes.first) / span;
      box.scrollTo({ left: share * lanes.getBoundingClientRect().width - box.clientWidth / 3, behavior: "smooth" });
    });
  };

  const lanes = (svg, data) => {
    svg.addEventListener("pointermove", (event) => {
      const [x, y] = place(svg, event);
      const time = data.first + (x / data.width) * (data.last - data.first);
      const round = data.rounds.find((entry) => time >= entry[1] && time < entry[2]);
      if (!round) { tip.style.visibility = "hidden"; return; }
      const states = charts.grid;
      const row = Math.floor((y - data.top) / data.row);
      const lines = [["took", `${(round[2] - round[1]).toFixed(2)} s`], ["at", `${time.toFixed(1)} s`]];
      if (states && row >= 0 && row < states.names.length) {
        lines.unshift([states.names[row], words[states.states[row][round[0]]]]);
      }
      show(event, `round ${round[0]}`, lines);
    });
  };

  const kinds = { line, grid, lanes };
  for (const svg of document.querySelectorAll("[data-chart]")) {
    const data = charts[svg.dataset.chart];
    if (!data) continue;
    kinds[data.kind](svg, data);
    svg.addEventListener("pointerleave", () => { tip.style.visibility = "hidden"; });
  }

  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });
  const filter = document.getElementById("filter");
  if (filter) {
    filter.addEventListener("click", () => {
      const only = document.querySelector(".events").classList.toggle("warnings");
      filter.textContent = only ? "Show all" : "Only warnings";
    });
  }
  for (const element of document.querySelectorAll("[data-copy]")) {
    element.addEventListener("click", () => {
      if (navigator.clipboard) navigator.clipboard.writeText(element.dataset.copy);
    });
  }
})();
