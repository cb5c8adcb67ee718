"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plans = data.plans;
  const narrow = () => document.documentElement.clientWidth < 600;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // plotly reads a little HTML in every text it draws; names must stay text
  const text = (name) => String(name).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const planColor = (plan) => css(`--plan-${plan.color}`);
  const faded = (color, share) => {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
    return `rgba(${r}, ${g}, ${b}, ${share})`;
  };
  const rowHeight = 46;
  const SHADES = [1, 0.6, 0.32, 0.16];
  const PATTERNS = { all_reduce: "x", all_gather: "/", reduce_scatter: "\\", all_to_all: "", broadcast: "." };
  const MARKS = { "peak active": "diamond", "peak reserved": "square-open", "peak resident": "circle", "sent, measured": "diamond" };

  function layout(rows, unit, extra) {
    const ink = css("--ink"), quiet = css("--quiet"), line = css("--line");
    return Object.assign({
      height: rows.length * rowHeight + 62,
      margin: { l: 10, r: 18, t: 6, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, sans-serif", size: 13, color: ink },
      hoverlabel: { bgcolor: css("--panel"), bordercolor: line, font: { color: ink, size: 13 }, align: "left" },
      hovermode: "closest",
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      showlegend: false,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: quiet, activecolor: ink },
      barmode: "stack", bargap: 0.4, boxmode: "overlay",
      xaxis: { title: { text: unit, font: { color: quiet, size: 12 }, standoff: 8 }, gridcolor: line, linecolor: line, zeroline: false,
        tickfont: { color: quiet, size: 12 }, automargin: true, nticks: narrow() ? 5 : 9, fixedrange: false },
      yaxis: { range: [rows.length - 0.5, -0.5], tickvals: rows.map((_, i) => i), ticktext: rows.map((plan) => text(plan.short)), ticks: "outside", ticklen: 7, tickcolor: "rgba(0,0,0,0)",
        automargin: true, showgrid: false, zeroline: false, fixedrange: true, tickfont: { color: ink, size: narrow() ? 11 : 13 } },
      shapes: [],
    }, extra);
  }

  function box(plan, values, at, unit, word, filled) {
    const color = planColor(plan);
    return {
      type: "box", orientation: "h", x: values, y: values.map(() => at), name: text(plan.label), width: word ? 0.3 : 0.5,
      boxpoints: "all", jitter: 0.6, pointpos: 0, line: { color, width: 1.6 }, fillcolor: faded(color, filled ? 0.3 : 0),
      marker: { color: filled ? color : "rgba(0,0,0,0)", size: 4.5, opacity: 0.8, line: { color, width: filled ? 0 : 1 } }, hoveron: "points",
      text: values.map((value, round) => `${text(plan.label)}${word}<br>round ${round + 1}: ${Number(value).toPrecision(4)} ${unit}`),
      hovertemplate: "%{text}<extra></extra>",
    };
  }

  function stepChart() {
    return [plans.map((plan, i) => box(plan, plan.step, i, data.step_unit, "", !plan.is_repeat)), layout(plans, data.step_unit, {})];
  }

  function ratioChart() {
    const ink = css("--ink");
    const traces = plans.flatMap((plan, i) => !plan.ratio ? [] : [{
      type: "scatter", mode: "markers", x: [plan.ratio[0]], y: [i],
      error_x: { type: "data", symmetric: false, array: [plan.ratio[2] - plan.ratio[0]], arrayminus: [plan.ratio[0] - plan.ratio[1]],
        color: planColor(plan), thickness: 2.5, width: 7 },
      marker: { color: planColor(plan), size: 12, symbol: plan.is_repeat ? "circle-open" : "circle", line: { color: planColor(plan), width: 2.5 } },
      text: [`${text(plan.label)}<br>${text(plan.ratio_text)}`], hovertemplate: "%{text}<extra></extra>",
    }]);
    const shapes = [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, layer: "below", line: { color: ink, width: 1.2 } }];
    if (data.noise) {
      shapes.push({ type: "rect", x0: data.noise[0], x1: data.noise[1], yref: "paper", y0: 0, y1: 1, layer: "below", line: { width: 0 }, fillcolor: css("--band") });
    }
    return [traces, layout(plans, "ratio of times", { shapes })];
  }

  function bars(segmentsOf, shadeOf, patternOf) {
    return plans.flatMap((plan, i) => segmentsOf(plan).map((segment) => {
      const color = planColor(plan), shade = shadeOf(segment), shape = patternOf(segment);
      return {
        type: "bar", orientation: "h", x: [segment.value], y: [i], width: 0.56,
        marker: { color: faded(color, shade), line: { color: css("--page"), width: 1 },
          pattern: { shape, fgcolor: shade > 0.5 ? css("--page") : color, fgopacity: 0.75, bgcolor: faded(color, shade), size: 7, solidity: 0.22 } },
        text: [`${text(plan.label)}<br>${text(segment.kind)}${segment.part ? ", " + text(segment.part) : ""}: ${text(segment.text)}`],
        textposition: "none", hovertemplate: "%{text}<extra></extra>",
      };
    }));
  }

  function marks(marksOf) {
    return plans.flatMap((plan, i) => marksOf(plan).map((mark) => ({
      type: "scatter", mode: "markers", x: [mark.value], y: [i], cliponaxis: false,
      marker: { symbol: MARKS[mark.kind], size: 11, color: css("--ink"), line: { color: mark.kind.includes("reserved") ? css("--ink") : css("--page"), width: 1.5 } },
      text: [`${text(plan.label)}<br>${text(mark.kind)}: ${text(mark.text)}`], hovertemplate: "%{text}<extra></extra>",
    })));
  }

  const unique = (values) => [...new Set(values)];
  const memoryKinds = ["parameters", "gradients", "optimizer"];
  const phases = unique(plans.flatMap((plan) => plan.wire.map((use) => use.part)));
  const phaseShade = (phase) => SHADES[Math.min(phases.indexOf(phase), SHADES.length - 1)];

  function memoryChart() {
    return [[...bars((plan) => plan.memory, (bar) => SHADES[memoryKinds.indexOf(bar.kind)], () => ""), ...marks((plan) => plan.memory_marks)],
      layout(plans, `${data.memory_unit} on one rank`, {})];
  }

  function wireChart() {
    return [[...bars((plan) => plan.wire, (bar) => phaseShade(bar.part), (bar) => PATTERNS[bar.kind] ?? "+"), ...marks((plan) => plan.wire_marks)],
      layout(plans, `${data.wire_unit} that one rank sends in a step`, {})];
  }

  function moduleChart() {
    const traces = plans.flatMap((plan, i) => [
      box(plan, plan.forward, i - 0.19, data.module_unit, ", forward", true), box(plan, plan.backward, i + 0.19, data.module_unit, ", backward", false)]);
    const made = layout(plans, data.module_unit, { height: plans.length * 58 + 62 });
    made.xaxis.rangemode = "tozero";
    return [traces, made];
  }

  function lossChart() {
    const first = plans.filter((plan) => plan.losses.length);
    const traces = first.map((plan, i) => ({
      type: "scatter", mode: plan.losses.length > 1 ? "lines" : "markers", x: plan.losses.map((_, step) => step + 1), y: plan.losses,
      line: { color: plan.is_repeat ? css("--ink") : planColor(plan), width: 2 + 3 * (first.length - 1 - i), dash: plan.is_repeat ? "dot" : "solid" },
      marker: { color: planColor(plan), size: 6 + 3 * (first.length - 1 - i) },
      text: plan.losses.map((loss, step) => `${text(plan.label)}<br>step ${step + 1}: loss ${loss === null ? "not finite" : loss.toPrecision(7)}`),
      hovertemplate: "%{text}<extra></extra>",
    }));
    const made = layout(plans, "optimizer step, warm-up included", { height: 340 });
    made.yaxis = { ...made.xaxis, title: { text: "loss", font: made.xaxis.title.font }, nticks: 7 };
    return [traces, made];
  }

  const CHARTS = { "chart-step": stepChart, "chart-ratio": ratioChart, "chart-memory": memoryChart, "chart-wire": wireChart,
    "chart-module": moduleChart, "chart-loss": lossChart };

  function swatch(draw) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 22 14");
    svg.setAttribute("aria-hidden", "true");
    for (const [name, attributes] of draw) {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      svg.append(element);
    }
    return svg;
  }

  const strokes = {
    x: "M0 0L14 14M14 0L0 14M8 0L22 14M22 0L8 14", "/": "M0 14L14 0M7 14L21 0M-7 14L7 0M14 14L28 0", "\\": "M0 0L14 14M7 0L21 14M-7 0L7 14M14 0L28 14",
    "": "", ".": "M4 4h2v2h-2zM11 4h2v2h-2zM17 4h2v2h-2zM4 9h2v2h-2zM11 9h2v2h-2zM17 9h2v2h-2z", "+": "M0 7H22M6 0V14M15 0V14" };
  const rectangle = (shade, shape) => swatch([["rect", { width: 22, height: 14, fill: "currentColor", "fill-opacity": shade }],
    ["path", { d: strokes[shape], stroke: shade > 0.5 ? "var(--page)" : "currentColor", "stroke-width": 1.6, fill: "none" }]]);
  const MARK_SHAPES = {
    "diamond": ["path", { d: "M11 1L17 7L11 13L5 7Z", fill: "currentColor" }],
    "square-open": ["rect", { x: 6, y: 2, width: 10, height: 10, fill: "none", stroke: "currentColor", "stroke-width": 2 }],
    "circle": ["circle", { cx: 11, cy: 7, r: 5.5, fill: "currentColor" }] };

  function key(id, entries) {
    const list = document.getElementById(id);
    if (!list) return;
    for (const [image, words] of entries) {
      const item = document.createElement("li");
      item.append(image, words);
      list.append(item);
    }
  }

  const markEntries = (kinds) => unique(kinds).map((kind) => [swatch([MARK_SHAPES[MARKS[kind]]]), kind]);
  key("key-memory", [...memoryKinds.map((kind, i) => [rectangle(SHADES[i], ""), kind]), ...markEntries(plans.flatMap((plan) => plan.memory_marks.map((mark) => mark.kind)))]);
  key("key-wire", [
    ...unique(plans.flatMap((plan) => plan.wire.map((use) => use.kind))).map((kind) => [rectangle(0.8, PATTERNS[kind] ?? "+"), kind]),
    ...phases.map((phase) => [rectangle(phaseShade(phase), ""), phase]),
    ...markEntries(plans.flatMap((plan) => plan.wire_marks.map((mark) => mark.kind)))]);
  key("key-loss", plans.filter((plan) => plan.losses.length).map((plan) => {
    if (plan.is_repeat) return [swatch([["path", { d: "M0 7H22", stroke: "currentColor", "stroke-width": 2.5, "stroke-dasharray": "3 3" }]]), plan.label];
    const image = rectangle(1, "");
    image.style.color = `var(--plan-${plan.color})`;
    return [image, plan.label];
  }));

  function draw(width) {
    for (const [id, chart] of Object.entries(CHARTS)) {
      const element = document.getElementById(id);
      if (!element) continue;
      const [traces, made] = chart();
      Plotly.react(element, traces, width ? { ...made, width } : made, { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]],
        displayModeBar: matchMedia("(pointer: coarse)").matches ? false : "hover", toImageButtonOptions: { format: "svg", filename: id } });
    }
  }

  const closed = [];
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details:not([open])")) { details.open = true; closed.push(details); }
    draw(680);
  });
  window.addEventListener("afterprint", () => {
    for (const details of closed.splice(0)) details.open = false;
    draw();
  });
  for (const query of ["print", "(prefers-color-scheme: dark)"]) {
    matchMedia(query).addEventListener("change", () => draw(matchMedia("print").matches ? 680 : undefined));
  }
  draw();
})();
