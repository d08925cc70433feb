"use strict";
{
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const { variants } = charts;
  const colour = (i) => `var(--c${i === 0 ? 0 : ((i - 1) % 7) + 1})`;
  const symbol = (i) => d3.symbolsFill[i % d3.symbolsFill.length];
  const STEPS = [["download", "download"], ["decode", "decode"], ["compile", "compile"], ["first_run", "first run"], ["other", "the rest"]];

  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  const seconds = (ms) => (ms >= 1000 ? `${d3.format(".3~r")(ms / 1000)} s` : `${d3.format(".3~r")(ms)} ms`);
  const bytes = (n) => (n >= 1e6 ? `${d3.format(".3~r")(n / 1e6)} MB` : n >= 1e3 ? `${d3.format(".3~r")(n / 1e3)} kB` : `${n} B`);
  const tipStyle = { fill: "var(--card)", stroke: "var(--quiet)", fontSize: 13, lineHeight: 1.35, textPadding: 10 };

  function legend(entries) {
    const list = element("ul", { className: "legend" });
    for (const [text, fill, shape] of entries) {
      const svg = d3.create("svg").attr("width", 13).attr("height", 13).attr("viewBox", "-6.5 -6.5 13 13");
      svg.append("path").attr("d", d3.symbol(shape, 70)()).attr("fill", fill);
      list.append(element("li", {}, svg.node(), text));
    }
    return list;
  }

  /** Draws into the figure, again whenever its width changes. `make(width)` returns what stands in it. */
  function draw(name, make) {
    const place = document.getElementById(`chart-${name}`);
    if (!place || !charts[name]) return {};
    // Screen readers have the figure's caption, which names the table: of the marks of a chart they can make nothing.
    const body = element("div", { ariaHidden: "true" });
    place.replaceChildren(body);
    let last = 0;
    const again = () => body.replaceChildren(...make(last));
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width > 0 && width !== last) {
        last = width;
        again();
      }
    }).observe(body);
    return { place, again: () => last && again() };
  }

  /** A drop-down for a chart, none where there is nothing to choose. */
  function choice(label, options, onChange) {
    if (options.length < 2) return [];
    const select = element("select", {}, ...options.map((option) => element("option", {}, option)));
    select.addEventListener("change", () => onChange(select.value));
    return [element("label", {}, `${label} `, select)];
  }

  /** Those that are the most accurate of all that are no larger, from small to large. */
  function staircase(data) {
    let best = -Infinity;
    return d3.sort(data.filter((d) => d.front), (d) => d.x, (d) => -d.at).filter((d) => d.at > best && ((best = d.at), true));
  }

  /** A place for the name of each dot at {px, py}: beside, above or below it, where it covers no dot and no other name. */
  function labels(dots, radius, [left, right]) {
    const taken = dots.map((d) => [d.px - radius, d.py - radius, d.px + radius, d.py + radius]);
    const far = radius + 6;
    return dots.map((d) => {
      const wide = d.text.length * 8.2;
      const places = [["start", far, 0], ["end", -far, 0], ["middle", 0, -far - 4], ["middle", 0, far + 4], ["start", far, -far], ["start", far, far], ["end", -far, -far], ["end", -far, far]].map(([anchor, dx, dy]) => {
        const from = d.px + dx - { start: 0, middle: wide / 2, end: wide }[anchor];
        return { anchor, dx, dy, box: [from, d.py + dy - 8, from + wide, d.py + dy + 8] };
      });
      const free = ({ box }) => box[0] >= left && box[2] <= right && taken.every((t) => t[2] <= box[0] || t[0] >= box[2] || t[3] <= box[1] || t[1] >= box[3]);
      const place = places.find(free) ?? places[0];
      taken.push(place.box);
      return { d, ...place };
    });
  }

  function overview() {
    const { y, points } = charts.overview;
    const of = (key) => [...new Set(points.flatMap((p) => Object.keys(p[key]).filter((k) => p[key][k] != null)))];
    const sizes = of("x"), backends = of("run");
    let size = sizes[0], backend = backends.find((b) => b.startsWith("WebAssembly,") && !b.endsWith(" 1 thread")) ?? backends[0];
    const backendsShown = [...new Set([backend, ...backends])].filter(Boolean);

    const drawn = draw("overview", (width) => {
      const known = points.filter((p) => p.x[size]);
      const finite = known.filter((p) => !p.exact).map((p) => p.y);
      const [low, high] = finite.length ? d3.extent(finite) : [0, 1];
      const room = Math.max(high - low, Math.abs(high) * 0.05, 1);
      // What is the same as the original has no figure: it stands on a line of its own, above all others.
      const top = high + room * 0.25;
      const some = known.some((p) => p.exact);
      const data = known.map((p) => ({ ...p, at: p.exact ? top : p.y, x: p.x[size], ms: p.run[backend] ?? null, name: variants[p.variant] }));
      const [least, most] = d3.extent(data, (d) => d.x);
      const margin = Math.max(most - least, most * 0.05);
      const ticks = d3.ticks(low - room * 0.1, high + room * 0.08, 6);
      const channels = { x: "x", y: "at" };
      const domain = least < most * 0.4 ? [0, most + margin * 0.12] : [least - margin * 0.15, most + margin * 0.15];
      const range = [low - room * 0.15, (some ? top : high) + room * 0.12];
      const radius = Math.min(15, 8 + width / 150), height = Math.max(320, Math.min(460, width * 0.55));
      const x = d3.scaleLinear(domain, [62, width - 24]), at = d3.scaleLinear(range, [height - 46, 46]);
      const placed = labels(data.map((d) => ({ ...d, text: cut(d.name, 20), px: x(d.x), py: at(d.at) })), radius, [62, width]);
      return [Plot.plot({
        width, height,
        marginLeft: 62, marginRight: 24, marginTop: 46, marginBottom: 46,
        style: { fontSize: "12px", background: "transparent" },
        x: { label: `${size} →`, labelAnchor: "right", domain, tickFormat: bytes, ticks: Math.max(3, Math.floor(width / 130)), grid: true },
        y: { label: `↑ ${y}`, domain: range, ticks: some ? [...ticks, top] : ticks, tickFormat: (v) => (some && v === top ? "identical" : d3.format("~r")(+v.toPrecision(4))), grid: true },
        r: { type: "sqrt", domain: [0, d3.max(data, (d) => d.ms) || 1], range: [0, radius] },
        marks: [
          some ? Plot.ruleY([top], { stroke: "currentColor", strokeOpacity: 0.35, strokeDasharray: "2 3" }) : null,
          Plot.line(staircase(data), { ...channels, curve: "step-after", stroke: "currentColor", strokeOpacity: 0.55, strokeDasharray: "5 4", strokeWidth: 1.5 }),
          Plot.dot(data, { ...channels, r: (d) => d.ms ?? (d3.max(data, (e) => e.ms) || 1) / 6, fill: (d) => (d.front ? colour(d.variant) : "var(--card)"), stroke: (d) => colour(d.variant), strokeWidth: 2, fillOpacity: 0.85 }),
          ...placed.map(({ d, anchor, dx, dy }) => Plot.text([d], { ...channels, text: "text", textAnchor: anchor, dx, dy, fontSize: 13, fontWeight: 600, fill: "currentColor", stroke: "var(--card)", strokeWidth: 4 })),
          Plot.tip(data, Plot.pointer({ ...channels, title: "words", maxRadius: 60, ...tipStyle })),
        ],
      })];
    });
    if (!drawn.place) return;
    drawn.place.prepend(element("div", { className: "controls" },
      ...choice("Size:", sizes, (value) => { size = value; drawn.again(); }),
      ...choice("Area of a dot, one run on:", backendsShown, (value) => { backend = value; drawn.again(); })));
  }

  function visits() {
    const { bars, totals, problems } = charts.visits;
    const backends = [...new Set([...bars, ...problems].map((b) => b.backend))];
    const used = STEPS.filter(([key]) => bars.some((b) => b.step === key && b.ms > 0));
    const longest = d3.max(totals, (t) => t.ms);
    const words = (total) => {
      const all = bars.filter((b) => b.backend === total.backend && b.variant === total.variant);
      return [`${variants[total.variant]}: ${total.words}`, ...used.map(([key, text]) => `${text}: ${all.find((b) => b.step === key)?.words ?? "–"}`)].join("\n");
    };
    draw("visits", (width) => {
      const left = Math.min(width * 0.28, 12 + 7.2 * d3.max(variants, (v) => Math.min(v.length, 16)));
      const charted = backends.flatMap((backend) => {
        const mine = bars.filter((b) => b.backend === backend), lost = problems.filter((b) => b.backend === backend);
        const order = variants.map((_, i) => i).filter((i) => [...mine, ...lost].some((b) => b.variant === i));
        const sums = totals.filter((t) => t.backend === backend);
        const at = { y: "variant", x: "ms" };
        return [element("h3", {}, backend), Plot.plot({
          width, height: order.length * 30 + 40, marginLeft: left, marginRight: 62, marginTop: 6, marginBottom: 30,
          style: { fontSize: "12px", background: "transparent" },
          x: { domain: [0, longest], label: null, tickFormat: seconds, ticks: Math.max(2, Math.floor(width / 150)), grid: true },
          y: { type: "band", domain: order, label: null, tickFormat: (i) => cut(variants[i], Math.floor(left / 7)), tickSize: 0, padding: 0.22 },
          marks: [
            Plot.barX(mine, { ...at, fill: (b) => `var(--s${STEPS.findIndex(([key]) => key === b.step)})`, order: (b) => STEPS.findIndex(([key]) => key === b.step), insetRight: 0.5 }),
            Plot.text(sums, { ...at, text: "words", textAnchor: "start", dx: 6, fill: "currentColor" }),
            Plot.text(lost, { y: "variant", x: 0, text: "words", textAnchor: "start", dx: 4, fill: "var(--bad)" }),
            Plot.tip(sums, Plot.pointerY({ ...at, title: words, anchor: "right", ...tipStyle })),
          ],
        })];
      });
      return [legend(used.map(([key, text]) => [text, `var(--s${STEPS.findIndex(([k]) => k === key)})`, d3.symbolSquare])), ...charted];
    });
  }

  function layers() {
    const { x, names, dots, more } = charts.layers;
    const shown = [...new Set(dots.map((d) => d.variant))].sort(d3.ascending);
    draw("layers", (width) => {
      const left = Math.min(width * 0.36, 14 + 7.4 * d3.max(names, (n) => n.length));
      const at = { x: "db", y: "layer" };
      return [
        legend(shown.map((i) => [variants[i], colour(i), symbol(i)])),
        Plot.plot({
          width, height: names.length * 26 + 62, marginLeft: left, marginRight: 20, marginTop: 8, marginBottom: 44,
          style: { fontSize: "12px", background: "transparent" },
          x: { label: width < 520 ? `${x.replace(" with only this layer compressed", "")} →` : `${x} →`, grid: true, nice: true, ticks: Math.max(3, Math.floor(width / 110)) },
          y: { type: "point", domain: d3.range(names.length), label: null, tickFormat: (i) => cut(names[i], Math.floor(left / 7)), tickSize: 0 },
          marks: [
            Plot.ruleY(names.map((_, i) => i), { stroke: "currentColor", strokeOpacity: 0.1 }),
            Plot.dot(dots, { ...at, fill: (d) => colour(d.variant), symbol: (d) => symbol(d.variant), r: 5.5 }),
            Plot.tip(dots, Plot.pointer({ ...at, title: "words", ...tipStyle })),
          ],
        }),
        ...(more ? [element("p", { className: "quiet" }, `and ${more} layers that cost less`)] : []),
      ];
    });
  }

  if (charts.overview) overview();
  if (charts.visits) visits();
  if (charts.layers) layers();

  // Tables are sorted by a press on a heading: numbers from large to small first, and what is missing always last.
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = element("button", { type: "button" }, ...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const numeric = heading.classList.contains("number");
        const before = heading.getAttribute("aria-sort");
        const down = before ? before === "ascending" : numeric;
        for (const other of headings) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => {
          const text = row.cells[column]?.dataset.sort;
          return text === undefined ? undefined : numeric ? (text === "inf" ? Infinity : Number(text)) : text;
        };
        const sorted = d3.sort(body.rows, (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          return down ? d3.descending(x, y) : d3.ascending(x, y);
        });
        body.append(...sorted);
      });
    });
  }
}
