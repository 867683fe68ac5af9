"use strict";
/* Draws the report from the JSON in the page. Every text goes in by textContent: nothing of a run is ever HTML. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("page");
  const SVG = "http://www.w3.org/2000/svg";
  const redraw = [];
  let smoothing = 0;

  /* ---- small tools ---- */

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "on") for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
      else if (name === "class") node.className = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((c) => c !== null && c !== undefined).map((c) => (c instanceof Node ? c : String(c))));
    return node;
  }

  function shape(parent, tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  function number(v, percent) {
    if (v === null || v === undefined) return "not finite";
    if (percent) return trim((v * 100).toPrecision(3)) + " %";
    const size = Math.abs(v);
    if (v === 0) return "0";
    if (size >= 1e5 || size < 1e-3) return v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return trim(size >= 1000 ? v.toFixed(0) : v.toPrecision(4));
  }
  const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

  function seconds(s) {
    if (s < 1) return trim((s * 1000).toPrecision(3)) + " ms";
    if (s < 60) return trim(s.toPrecision(3)) + " s";
    const two = (n) => String(n).padStart(2, "0");
    const whole = Math.round(s), h = Math.floor(whole / 3600), m = Math.floor(whole / 60) % 60;
    return h ? `${h}:${two(m)}:${two(whole % 60)} h` : `${m}:${two(whole % 60)} min`;
  }

  function stageAt(x) {
    let found = data.stages[0];
    for (const stage of data.stages) if (x > stage.begins) found = stage;
    return found;
  }
  function stepAt(x) {
    const stage = stageAt(x);
    if (!stage) return `step ${trim(x.toFixed(2))}`;
    return `${data.stages.length > 1 ? `${stage.number + 1}. ` : ""}${stage.kind}, step ${trim((x - stage.begins).toFixed(2))}`;
  }

  /* ---- axes ---- */

  function linearTicks(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((m) => m * power >= raw * 0.999) * power;
    const ticks = [];
    for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) ticks.push(Math.abs(t) < step * 1e-6 ? 0 : t);
    return { ticks, step };
  }

  function scaleOf(values, kind, percent) {
    let low = Infinity, high = -Infinity;
    for (const v of values) if (v !== null) { if (v < low) low = v; if (v > high) high = v; }
    if (low === Infinity) { low = 0; high = 1; }
    const wide = kind === "log" && low > 0 && high / low > 20;
    if (wide) {
      const a = Math.floor(Math.log10(low)), b = Math.max(a + 1, Math.ceil(Math.log10(high) - 1e-9));
      const every = Math.ceil((b - a) / 5), ticks = [];
      for (let p = a; p <= b; p += every) ticks.push(10 ** p);
      return { ticks, at: (v) => (Math.log10(v) - a) / (b - a), label: (v) => number(v, percent) };
    }
    if (low >= 0 && low < high * 0.6) low = 0;
    const size = Math.max(Math.abs(low), Math.abs(high));
    if (high - low <= size * 1e-9) { const room = size * 0.05 || (percent ? 0.01 : 1); low -= low === 0 ? 0 : room; high += room; }
    const { ticks, step } = linearTicks(low, high, 4);
    if (!ticks.length) ticks.push(Math.floor(low / step) * step);
    if (low < ticks[0] - step * 0.02) ticks.unshift(ticks[0] - step);
    if (high > ticks[ticks.length - 1] + step * 0.02) ticks.push(ticks[ticks.length - 1] + step);
    const a = Math.min(low, ticks[0]), b = Math.max(high, ticks[ticks.length - 1]);
    return { ticks, at: (v) => (v - a) / (b - a), label: (v) => axisLabel(v, step, percent) };
  }

  function axisLabel(v, step, percent) {
    if (percent) { v *= 100; step *= 100; }
    const size = Math.max(Math.abs(v), step);
    let text;
    if (size >= 1e6 || step < 1e-4) text = v === 0 ? "0" : trim(v.toPrecision(3)).includes("e") || size < 1e-3 || size >= 1e6 ? v.toExponential(1).replace(".0e", "e").replace("e+", "e") : trim(v.toPrecision(5));
    else if (size >= 1e4) text = trim((v / 1000).toFixed(step < 1000 ? 1 : 0)) + "k";
    else text = v.toFixed(Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9))));
    return percent ? text + " %" : text;
  }

  /* ---- charts ---- */

  const HEIGHT = 190, LEFT = 50, RIGHT = 10, TOP = 8, BOTTOM = 22;

  function frame(box, xLow, xHigh, y, stages) {
    const width = Math.max(240, box.clientWidth);
    box.replaceChildren();
    const svg = shape(box, "svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img" });
    const toX = (x) => LEFT + ((x - xLow) / (xHigh - xLow || 1)) * (width - LEFT - RIGHT);
    const toY = (v) => HEIGHT - BOTTOM - y.at(v) * (HEIGHT - TOP - BOTTOM);
    for (const tick of y.ticks) {
      shape(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: toY(tick), y2: toY(tick), class: "gridline" });
      shape(svg, "text", { x: LEFT - 7, y: toY(tick) + 4, "text-anchor": "end" }, y.label(tick));
    }
    if (stages && data.stages.length > 1) for (const stage of data.stages.slice(1)) {
      if (stage.begins > xLow && stage.begins < xHigh)
        shape(svg, "line", { x1: toX(stage.begins), x2: toX(stage.begins), y1: TOP, y2: HEIGHT - BOTTOM, class: "stageline" });
    }
    shape(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, class: "axis" });
    return { svg, toX, toY, width };
  }

  function stepTicks(f, xLow, xHigh) {
    for (const tick of linearTicks(xLow, xHigh, f.width > 500 ? 8 : 5).ticks) {
      if (Math.abs(tick - Math.round(tick)) > 1e-6) continue;
      shape(f.svg, "text", { x: f.toX(tick), y: HEIGHT - 6, "text-anchor": "middle" }, tick >= 1e4 ? trim((tick / 1000).toFixed(1)) + "k" : Math.round(tick));
    }
  }

  function smoothed(ys) {
    if (!smoothing) return ys;
    let mean = null;
    return ys.map((y) => (y === null ? null : (mean = mean === null ? y : smoothing * mean + (1 - smoothing) * y)));
  }

  function path(f, xs, ys) {
    let text = "", pen = false;
    for (let i = 0; i < xs.length; i++) {
      if (ys[i] === null) { pen = false; continue; }
      text += `${pen ? "L" : "M"}${f.toX(xs[i]).toFixed(1)} ${f.toY(ys[i]).toFixed(1)}`;
      pen = true;
    }
    return text;
  }

  function nearest(xs, x) {
    let a = 0, b = xs.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] <= x) a = m; else b = m; }
    return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
  }

  function legend(names, block) {
    return make("div", { class: "legend" }, ...names.map((name, i) =>
      make("span", {}, make("i", { class: `swatch b${i % 8}${block ? " block" : ""}` }), name)));
  }

  function hover(box, f, xLow, xHigh, rowsAt) {
    const hair = shape(f.svg, "line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "hair", visibility: "hidden" });
    const tip = make("div", { class: "tip", hidden: "" });
    box.append(tip);
    const leave = () => { hair.setAttribute("visibility", "hidden"); tip.hidden = true; };
    const move = (event) => {
      const edges = f.svg.getBoundingClientRect();
      const at = ((event.clientX - edges.left) / edges.width) * f.width;
      if (at < LEFT - 8 || at > f.width - RIGHT + 8) return leave();
      const x = xLow + ((Math.min(Math.max(at, LEFT), f.width - RIGHT) - LEFT) / (f.width - LEFT - RIGHT)) * (xHigh - xLow);
      const { place, title, rows } = rowsAt(x);
      hair.setAttribute("x1", f.toX(place)); hair.setAttribute("x2", f.toX(place)); hair.setAttribute("visibility", "visible");
      tip.replaceChildren(make("div", { class: "soft" }, title), make("table", {}, ...rows.map(([name, value, color]) =>
        make("tr", {}, make("td", {}, make("i", { class: `swatch b${color % 8}` }), " ", name), make("td", {}, value)))));
      tip.hidden = false;
      const room = box.clientWidth, size = tip.offsetWidth, px = f.toX(place) * (edges.width / f.width);
      tip.style.left = `${Math.max(0, px + 12 + size > room ? px - 12 - size : px + 12)}px`;
    };
    box.onpointermove = move; box.onpointerdown = move; box.onpointerleave = leave;
  }

  function range() {
    const last = data.stages[data.stages.length - 1];
    let high = 1;
    for (const stage of data.stages) if (stage.done) high = Math.max(high, stage.begins + stage.done);
    return [0, last ? high : 1];
  }

  function lineChart(chart) {
    const box = make("div", { class: "plot" });
    const names = chart.series.map((s) => s.name);
    const card = make("div", { class: "card" }, make("div", { class: "top" }, make("h3", {}, chart.title), legend(names)), box);
    const draw = () => {
      const [xLow, xHigh] = range();
      const y = scaleOf(chart.series.flatMap((s) => s.points[1]), chart.scale, chart.percent);
      const f = frame(box, xLow, xHigh, y, true);
      stepTicks(f, xLow, xHigh);
      chart.series.forEach((s, i) => {
        const [xs, ys] = s.points;
        if (smoothing && xs.length > 2) shape(f.svg, "path", { d: path(f, xs, ys), class: `curve faint k${i % 8}` });
        shape(f.svg, "path", { d: path(f, xs, smoothed(ys)), class: `curve k${i % 8}` });
        if (xs.length <= 40) xs.forEach((x, j) => ys[j] !== null && shape(f.svg, "circle", { cx: f.toX(x), cy: f.toY(smoothed(ys)[j]), r: 2.2, class: `b${i % 8}` }));
        const bad = xs.filter((_, j) => ys[j] === null);
        for (const x of bad) shape(f.svg, "text", { x: f.toX(x), y: TOP + 6, "text-anchor": "middle", class: "error" }, "×");
      });
      hover(box, f, xLow, xHigh, (x) => {
        const near = chart.series.map((s) => s.points[0][nearest(s.points[0], x)]);
        const place = near.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
        const rows = [];
        chart.series.forEach((s, i) => {
          const j = nearest(s.points[0], place);
          const off = Math.abs(s.points[0][j] - place) > 0.5 ? ` (${stepAt(s.points[0][j])})` : "";
          rows.push([s.name, number(s.points[1][j], chart.percent) + off, i]);
        });
        return { place, title: stepAt(place), rows };
      });
    };
    redraw.push({ box, draw });
    return card;
  }

  function profileChart(profile) {
    const box = make("div", { class: "plot" });
    const shown = profile.lines.map((line, i) => [line, i]).filter(([line]) => line.values.some((v) => v !== null));
    const card = make("div", { class: "card" }, make("div", { class: "top" }, make("h3", {}, profile.title),
      make("div", { class: "legend" }, ...shown.map(([line, i]) => make("span", {}, make("i", { class: `swatch b${i}` }), line.name)))), box);
    const label = (p) => (p >= 1024 ? `${trim((p / 1024).toFixed(1))}k` : String(p));
    const draw = () => {
      const high = profile.buckets.length - 1;
      const f = frame(box, -0.2, high + 0.2, scaleOf(shown.flatMap(([line]) => line.values), profile.scale), false);
      profile.buckets.forEach((p, i) => shape(f.svg, "text", { x: f.toX(i), y: HEIGHT - 6, "text-anchor": "middle" }, `${label(p)}+`));
      for (const [line, i] of shown) {
        shape(f.svg, "path", { d: path(f, profile.buckets.map((_, j) => j), line.values), class: `curve k${i}` });
        line.values.forEach((v, j) => v !== null && shape(f.svg, "circle", { cx: f.toX(j), cy: f.toY(v), r: 3, class: `b${i}` }));
      }
      hover(box, f, -0.2, high + 0.2, (x) => {
        const j = Math.min(high, Math.max(0, Math.round(x)));
        const end = profile.buckets[j + 1];
        return { place: j, title: `positions ${profile.buckets[j].toLocaleString("en")}${end ? ` to ${(end - 1).toLocaleString("en")}` : " and later"}`,
          rows: shown.map(([line, i]) => [line.name, line.values[j] === null ? "none" : number(line.values[j]), i]) };
      });
    };
    redraw.push({ box, draw });
    return card;
  }

  function barChart(title, names, bars, format, fixedHigh) {
    const box = make("div", { class: "plot" });
    const card = make("div", { class: "card" }, make("div", { class: "top" }, make("h3", {}, title), legend(names, true)), box);
    const draw = () => {
      const [xLow, xHigh] = range();
      const sums = bars.map((b) => b.values.reduce((a, v) => a + v, 0));
      const f = frame(box, xLow, xHigh, scaleOf([0, fixedHigh || Math.max(...sums)], "linear", format.percent), true);
      stepTicks(f, xLow, xHigh);
      bars.forEach((bar, n) => {
        const from = n ? (bars[n - 1].to + bar.from) / 2 : bar.from - 0.5, to = n + 1 < bars.length ? (bar.to + bars[n + 1].from) / 2 : bar.to + 0.5;
        const x1 = Math.max(f.toX(from), LEFT), x2 = Math.min(f.toX(to), f.width - RIGHT);
        const gap = x2 - x1 > 5 ? 1 : 0;
        let sum = 0;
        bar.values.forEach((v, i) => {
          if (v > 0) shape(f.svg, "rect", { x: x1, width: Math.max(0.5, x2 - x1 - gap), y: f.toY(sum + v), height: Math.max(0, f.toY(sum) - f.toY(sum + v)), class: `b${i % 8}` });
          sum += v;
        });
      });
      hover(box, f, xLow, xHigh, (x) => {
        const n = nearest(bars.map((b) => (b.from + b.to) / 2), x), bar = bars[n];
        const title = bar.from === bar.to ? stepAt(bar.to) : `${stepAt(bar.from)} to ${stepAt(bar.to)}, mean`;
        return { place: (bar.from + bar.to) / 2, title, rows: names.map((name, i) => [name, format(bar.values[i]), i]).filter((r, i) => bar.values[i] > 0).reverse() };
      });
    };
    redraw.push({ box, draw });
    return card;
  }

  /* ---- sections ---- */

  const navigation = make("nav", { "aria-label": "Sections" });

  function section(title, ...children) {
    const id = title.toLowerCase().replace(/[^a-z]+/g, "-").replace(/^-|-$/g, "");
    navigation.append(make("a", { href: `#${id}` }, title));
    main.append(make("section", { id }, make("h2", {}, title), ...children));
  }

  function table(columns, rows, name) {
    return make("table", { class: name || "" },
      make("thead", {}, make("tr", {}, ...columns.map(([label, type]) => make("th", type ? { class: type } : {}, label)))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value, i) => make("td", columns[i][1] ? { class: columns[i][1] } : {}, value))))));
  }

  function head() {
    const states = { done: "done", failed: "failed", interrupted: "interrupted", open: "not ended" };
    const slider = make("input", { type: "range", min: 0, max: 0.98, step: 0.01, value: 0 });
    slider.oninput = () => { smoothing = Number(slider.value); refresh(); };
    main.append(make("div", { class: "head" }, make("h1", {}, data.title), make("span", { class: `pill ${data.state}` }, states[data.state]),
      make("label", {}, "smooth the curves", slider)));
    if (data.state_words) main.append(make("p", { class: `words ${data.state === "failed" ? "failed" : "soft"}` }, data.state_words));
    main.append(navigation);
    if (data.notes.length) main.append(make("div", { class: "notes" }, ...data.notes.map((note) => make("p", {}, note))));
    main.append(make("div", { class: "tiles" }, ...data.tiles.map((tile) => make("div", { class: "tile" },
      make("div", { class: "label" }, tile.label), make("div", { class: "value" }, tile.value),
      tile.before ? make("div", { class: "before" }, tile.before) : null))));
    if (data.plan.length) main.append(table([["Stage"], ["Steps", "number"], ["Settings"]], data.plan.map((s) => [s.name, s.done, s.settings]), "plan"));
  }

  function curves() {
    for (const part of data.sections) {
      const grid = make("div", { class: "grid" });
      if (!part.folded) {
        grid.append(...part.charts.map(lineChart));
        section(part.title, grid);
        continue;
      }
      const details = make("details", { class: "folded" }, make("summary", {}, `${part.title}: ${part.charts.length} more charts`), grid);
      details.addEventListener("toggle", () => {
        if (details.open && !grid.childElementCount) { grid.append(...part.charts.map(lineChart)); refresh(); }
      });
      main.append(details);
    }
  }

  function positions() {
    if (!data.profiles.length) return;
    section("By position", make("p", { class: "soft" }, "Means over the tokens from each position of their document up to the next, in three parts of the run."),
      make("div", { class: "grid" }, ...data.profiles.map(profileChart)));
  }

  function times() {
    const { names, bars, totals, evaluation } = data.phases;
    if (!bars.length) return;
    const all = totals.reduce((a, b) => a + b, 0) || 1;
    const share = (v) => `${((v / all) * 100).toFixed(1)} %`;
    const order = names.map((_, i) => i).filter((i) => totals[i] > 0).sort((a, b) => totals[b] - totals[a]);
    const meter = make("div", { class: "meter" });
    for (const i of order) { const piece = make("i", { class: `b${i % 8}` }); piece.style.width = `${(totals[i] / all) * 100}%`; meter.append(piece); }
    const swatch = (i) => make("span", {}, make("i", { class: `swatch block b${i % 8}` }), ` ${names[i]}`);
    const rows = order.map((i) => [swatch(i), seconds(totals[i]), share(totals[i])]);
    rows.push([make("b", {}, "all steps"), make("b", {}, seconds(all)), ""]);
    if (evaluation) rows.push(["evaluation, beside them", seconds(evaluation), ""]);
    section("Where the time goes", make("div", { class: "split" },
      barChart("Seconds of a step", names, bars.map((b) => ({ from: b.from, to: b.to, values: b.seconds })), seconds),
      make("div", { class: "card" }, make("h3", {}, "In all"), meter, table([["Phase"], ["Time", "number"], ["Share", "number"]], rows))));
  }

  function mixture() {
    const { names, bars, totals } = data.mixture;
    if (!names.length) return;
    const percent = Object.assign((v) => number(v, true), { percent: true });
    section("The mixture that was seen", make("div", { class: "split" },
      barChart("Share of the stage's tokens so far", names, bars.map((b) => ({ from: b.from, to: b.to, values: b.parts })), percent, 1),
      make("div", { class: "card" }, make("h3", {}, "In all"), table([["Stage"], ["Source"], ["Share", "number"]], totals.map(([stage, name, part]) => [stage, name, `${(part * 100).toFixed(2)} %`])))));
  }

  function rollouts() {
    const { items, note } = data.rollouts;
    const list = make("div"), count = make("span", { class: "soft" }), more = make("button", { type: "button" }, "Show more");
    if (!items.length) { section("Rollouts", make("p", { class: "soft" }, note)); return; }
    const at = (item) => ((data.stages[item.stage] || {}).begins || 0) + item.step;
    const steps = [...new Set(items.map(at))];
    const step = make("select", { "aria-label": "Step" }, make("option", { value: "" }, "all steps"), ...steps.map((s) => make("option", { value: s }, stepAt(s))));
    const order = make("select", { "aria-label": "Order" }, ...[["step", "first steps first"], ["last", "last steps first"], ["high", "highest reward first"], ["low", "lowest reward first"], ["long", "longest first"]]
      .map(([value, label]) => make("option", { value }, label)));
    const search = make("input", { type: "search", placeholder: "search the texts", "aria-label": "Search" });
    const by = { step: (a, b) => at(a) - at(b), last: (a, b) => at(b) - at(a), high: (a, b) => b.total - a.total, low: (a, b) => a.total - b.total, long: (a, b) => b.tokens - a.tokens };
    let found = [], shownCount = 0;
    const card = (item) => make("article", { class: "rollout" },
      make("header", {}, make("b", {}, stepAt(at(item))), ...Object.entries(item.rewards).map(([name, value]) => make("span", {}, `${name} `, make("b", {}, value))),
        make("span", {}, `${item.tokens} tokens`), make("span", { class: item.finish === "length" ? "warning" : "" }, item.finish === "length" ? "cut at max_tokens" : item.finish), item.name ? make("span", {}, item.name) : null),
      make("div", { class: "text prompt" }, make("div", { class: "who" }, "prompt"), make("pre", {}, item.prompt)),
      make("div", { class: "text" }, make("div", { class: "who" }, "response"), make("pre", {}, item.response)));
    const extend = () => {
      list.append(...found.slice(shownCount, shownCount + 10).map(card));
      shownCount = Math.min(found.length, shownCount + 10);
      count.textContent = `${shownCount} of ${found.length}`;
      more.hidden = shownCount >= found.length;
    };
    const apply = () => {
      const words = search.value.toLowerCase();
      found = items.filter((i) => (step.value === "" || String(at(i)) === step.value) && (!words || `${i.prompt}\n${i.response}\n${i.name}`.toLowerCase().includes(words))).sort(by[order.value]);
      shownCount = 0;
      list.replaceChildren();
      extend();
    };
    step.onchange = order.onchange = search.oninput = apply;
    more.onclick = extend;
    apply();
    section("Rollouts", note ? make("p", { class: "soft" }, note) : null, make("div", { class: "bar" }, step, order, search, count), list, more);
  }

  function happenings() {
    if (!data.events.length) { section("Events", make("p", { class: "soft" }, "No event is recorded.")); return; }
    const rows = data.events.map((event) => {
      const where = event.stage ? `${event.stage}, step ${event.step}` : "";
      const when = typeof event.time === "number" && data.begun ? `+${seconds(Math.max(0, event.time - data.begun))}` : "";
      return [make("span", { title: typeof event.time === "number" ? new Date(event.time * 1000).toLocaleString() : "" }, when),
        make("span", { class: `pill ${["info", "warning", "error"].includes(event.level) ? event.level : "info"}` }, event.kind), where, make("div", { class: "words" }, event.words)];
    });
    section("Events", table([["After", "number"], ["Kind"], ["Where"], ["What"]], rows, "events"));
  }

  function settings() {
    section("What was run", make("dl", { class: "facts" }, ...data.facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
      data.config ? make("details", {}, make("summary", {}, "config.yaml, resolved"), make("pre", { class: "config" }, data.config)) : null);
    main.append(make("p", { class: "soft" }, `Made by megatron-dgrpo ${data.version}, ${new Date(data.made * 1000).toLocaleString()}.`));
  }

  /* ---- drawing ---- */

  const refresh = () => { for (const { box, draw } of redraw) if (box.clientWidth) draw(); };

  head();
  curves();
  positions();
  times();
  mixture();
  rollouts();
  happenings();
  settings();
  refresh();
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; requestAnimationFrame(refresh); } });
})();
