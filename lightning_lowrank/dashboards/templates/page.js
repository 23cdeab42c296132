"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = data.charts.map((chart, number) => ({ ...chart, box: document.getElementById(`plot-${number}`) }));
  const PRINTED = 330;
  const tip = document.querySelector(".tip");
  const state = { axis: "step", chosen: null };
  const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const whole = new Intl.NumberFormat("en");
  const make = (name, text) => Object.assign(document.createElement(name), { textContent: text ?? "" });

  // The value of a piecewise linear table at x; null outside of it.
  function interpolated(table, x) {
    let low = 0, high = table.x.length - 1;
    if (x < table.x[low] || x > table.x[high]) return null;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (table.x[middle] <= x) low = middle; else high = middle;
    }
    const share = (x - table.x[low]) / (table.x[high] - table.x[low] || 1);
    return table.y[low] + share * (table.y[high] - table.y[low]);
  }

  // The cumulative decay that can take the place of a chart's steps: known at one of them at least.
  function decayOf(chart) {
    const table = chart.steps ? data.decay[chart.part] : null;
    const inside = (x) => x >= table.x[0] && x <= table.x.at(-1);
    return table && chart.lines.some((line) => line.x.some(inside)) ? table : null;
  }

  const placed = (chart, x) => (state.axis === "decay" && decayOf(chart) ? interpolated(decayOf(chart), x) : x);
  const drawnLines = (chart) =>
    chart.kind === "band" ? chart.lines.filter((line) => line.name === state.chosen) : chart.lines;

  function indexOf(chart, name) {
    if (name === null || chart.kind === "bars") return -1;
    if (chart.kind === "dots") return chart.names.indexOf(name) + 1 || -1;
    return chart.lines.findIndex((line) => line.name === name);
  }

  function rowsOf(chart) {
    if (chart.kind === "bars") return chart.rows;
    return drawnLines(chart).flatMap((line, s) =>
      line.x.map((x, i) => {
        const error = line.e ? line.e[i] : 0;
        return { s, x: placed(chart, x), y: line.y[i], low: line.y[i] - error, high: line.y[i] + error };
      }).filter((row) => row.x !== null));
  }

  function bandOf(chart) {
    const { x, ...quantiles } = chart.band;
    return x.map((at, i) => ({
      x: placed(chart, at), step: at,
      ...Object.fromEntries(Object.entries(quantiles).map(([name, values]) => [name, values[i]])),
    })).filter((row) => row.x !== null);
  }

  // The rows to draw: as long as no layer is chosen, a point of the median, since a scale needs a number to begin with.
  function updated(chart) {
    chart.rows_ = rowsOf(chart);
    const end = chart.band_?.at(-1);
    return chart.rows_.length || !end ? chart.rows_ : [{ s: 0, x: end.x, y: end.q2 }];
  }

  function draw(chart, width = "container") {
    chart.drawn ??= (async () => {
      const spec = { ...structuredClone(chart.spec), width };
      const byDecay = state.axis === "decay" && decayOf(chart);
      for (const layer of byDecay ? spec.layer : []) {
        if (layer.encoding.x) layer.encoding.x.title = "cumulative decay (tau)";
      }
      spec.params[0].value = indexOf(chart, state.chosen);
      spec.params[1].value = chart.names ?? [];
      if (chart.band) chart.band_ = bandOf(chart);
      spec.datasets = { rows: updated(chart), ...(chart.band && { band: chart.band_ }) };
      const options = { renderer: "svg", actions: false, defaultStyle: false, tooltip: false, hover: false };
      chart.view = (await vegaEmbed(chart.box.firstElementChild, spec, options)).view;
    })();
    return chart.drawn;
  }

  // In the page's order. A pause for the reader's input after every chart would let the browser lay out the page as
  // often, which takes longer than the charts do.
  async function drawAll() {
    let paused = performance.now();
    for (const chart of charts) {
      await draw(chart);
      if (performance.now() - paused > 200) {
        await new Promise((resolve) => setTimeout(resolve));
        paused = performance.now();
      }
    }
    document.documentElement.dataset.drawn = state.axis;
    performance.mark("drawn");
  }

  function choose(name) {
    state.chosen = name === state.chosen || name === "" ? null : name;
    for (const button of document.querySelectorAll(".pick")) {
      button.setAttribute("aria-pressed", String(button.dataset.name === state.chosen));
    }
    for (const label of document.querySelectorAll(".chosen-name")) label.textContent = state.chosen ?? "no layer chosen";
    const select = document.getElementById("layer");
    if (select) select.value = state.chosen !== null && data.layers.includes(state.chosen) ? state.chosen : "";
    for (const chart of charts) {
      if (!chart.view || chart.kind === "bars") continue;
      chart.view.signal("chosen", indexOf(chart, state.chosen));
      if (chart.kind === "band") chart.view.data("rows", updated(chart));
      chart.view.runAsync();
    }
  }

  const nearest = (rows, x) => rows.reduce((best, row) => (Math.abs(row.x - x) < Math.abs(best.x - x) ? row : best));

  // What lies under the pointer: the row nearest in x of every series, with its name, colour and value.
  function under(chart, event) {
    const svg = chart.box.querySelector("svg"), rect = svg.getBoundingClientRect();
    const scale = svg.width.baseVal.value / rect.width, [left, top] = chart.view.origin();
    const toX = chart.view.scale("x"), toY = chart.view.scale("y");
    const x = toX.invert((event.clientX - rect.left) * scale - left);
    const y = (event.clientY - rect.top) * scale - top;
    let entries = [];
    const add = (row, name, value, colour) =>
      entries.push({ row, name, value, colour, far: Math.abs(toY(value) - y) });
    const bySeries = Object.groupBy(chart.rows_, (row) => row.s);
    for (const [s, rows] of Object.entries(bySeries)) {
      const line = drawnLines(chart)[s], row = nearest(rows, x);
      const colour = chart.kind === "band" ? "var(--series-2)" : chart.legend[s]?.[1] ?? "var(--series-1)";
      add(row, chart.kind === "dots" ? chart.names[row.x - 1] : line.name, row.y, colour);
    }
    if (chart.band_?.length) {
      const row = nearest(chart.band_, x), names = ["smallest", "10 %", "median", "90 %", "largest"];
      names.forEach((name, q) => add(row, name, row[`q${q}`], "var(--series-1)"));
    }
    if (!entries.length) return null;
    const closest = nearest(entries.map((entry) => entry.row), x);
    // Of many lines those near the pointer.
    entries.sort((a, b) => a.far - b.far);
    entries = entries.slice(0, entries.length > 13 ? 6 : 13).sort((a, b) => b.value - a.value);
    return { entries, at: closest.x, pixel: (left + toX(closest.x)) / scale };
  }

  function showTip(chart, event) {
    const found = chart.view && under(chart, event);
    if (!found) return;
    const table = decayOf(chart), byDecay = state.axis === "decay" && table;
    const head = chart.kind === "dots" ? found.entries[0].name
      : byDecay ? `cumulative decay ${number.format(found.at)}`
      : chart.steps ? `step ${whole.format(found.at)}` : `number ${whole.format(found.at)}`;
    const tau = table && !byDecay ? interpolated(table, found.at) : null;
    tip.replaceChildren(make("p", tau === null ? head : `${head}, tau ${number.format(tau)}`));
    for (const { name, value, colour } of found.entries) {
      const line = make("div"), label = make(name === state.chosen ? "strong" : "span"), dot = make("i");
      dot.style.background = colour;
      label.append(dot, chart.kind === "dots" ? "value" : name);
      line.append(label, make("b", number.format(value)));
      tip.append(line);
    }
    tip.hidden = false;
    const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4))}px`;
    chart.hair ??= chart.box.appendChild(Object.assign(make("div"), { className: "hair" }));
    chart.hair.style.left = `${found.pixel}px`;
    chart.hair.hidden = false;
  }

  for (const chart of charts.filter(({ kind }) => kind !== "bars")) {
    for (const kind of ["pointermove", "pointerdown"]) chart.box.addEventListener(kind, (event) => showTip(chart, event));
    for (const kind of ["pointerleave", "pointercancel"]) {
      chart.box.addEventListener(kind, () => {
        tip.hidden = true;
        if (chart.hair) chart.hair.hidden = true;
      });
    }
    chart.box.addEventListener("click", (event) => {
      const found = chart.view && under(chart, event);
      const layer = found?.entries.filter(({ name }) => data.layers.includes(name)).sort((a, b) => a.far - b.far)[0];
      if (layer) choose(layer.name);
    });
  }

  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.addEventListener("change", async () => {
      await Promise.all(charts.map((chart) => chart.drawn));
      state.axis = input.value;
      for (const chart of charts.filter(decayOf)) {
        chart.view?.finalize();
        chart.view = chart.drawn = undefined;
      }
      drawAll();
    });
  }
  document.getElementById("layer")?.addEventListener("change", (event) => choose(event.target.value));
  for (const button of document.querySelectorAll(".pick")) {
    button.addEventListener("click", () => choose(button.dataset.name));
  }

  // Tables: a column's first click sorts it upwards, the next one downwards; what has no number comes last.
  const compared = new Intl.Collator("en", { numeric: true });
  for (const button of document.querySelectorAll(".sortable thead button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
      const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
      const valueOf = (row) => row.cells[head.cellIndex].dataset.value ?? "";
      const textOf = (row) => row.cells[head.cellIndex].textContent;
      const byNumber = (a, b) =>
        valueOf(a) === "" || valueOf(b) === "" ? (valueOf(a) === "") - (valueOf(b) === "") : sign * (valueOf(a) - valueOf(b));
      const byText = (a, b) => sign * compared.compare(textOf(a), textOf(b));
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...body.rows].sort(head.classList.contains("number") ? byNumber : byText));
    });
  }

  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const sayTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    sayTheme();
  });
  dark.addEventListener("change", sayTheme);
  sayTheme();
  // Paper has two narrow columns, in which a chart that is only scaled down could not be read.
  addEventListener("beforeprint", () => {
    for (const chart of charts) chart.view ? chart.view.width(PRINTED).run() : draw(chart, PRINTED);
  });
  addEventListener("afterprint", () => dispatchEvent(new Event("resize")));
  document.querySelector(".controls").hidden = false;
  drawAll();
})();
