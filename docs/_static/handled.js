// Figures that can be handled. The data are those that a cell of the notebook has computed, in a
// script beside its output; controls and canvases take the place of the still picture there.
(() => {
  const make = (tag, attributes = {}, ...children) => {
    const svg = "svg g path line circle text".split(" ").includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const percent = (part, whole) => `${(100 * part / whole).toFixed(1)}\u00a0%`;

  // A range of `steps` positions; `say` names one of them.
  const slider = (name, title, steps, at, say, moved) => {
    const input = make("input", { type: "range", min: 0, max: steps - 1, step: 1, value: at, name, autocomplete: "off" });
    const output = make("span", { class: "value", "aria-hidden": "true" });
    const tell = () => {
      const words = say(Number(input.value));
      output.textContent = words;
      input.setAttribute("aria-valuetext", words);
    };
    input.addEventListener("input", () => { tell(); moved(Number(input.value)); });
    const set = position => { input.value = position; tell(); };
    set(at);
    return { row: make("label", { class: "control" }, make("span", {}, title), input, output), set };
  };

  const button = (text, pressed) => {
    const made = make("button", { type: "button" }, text);
    made.addEventListener("click", pressed);
    return made;
  };

  // A picture with a title; `frame` is the outline of a crop on it.
  const panel = (title, [height, width], what) => {
    const canvas = make("canvas", { width, height, role: "img", "aria-label": what });
    const frame = make("div", { class: "frame", hidden: "" });
    return { canvas, frame, context: canvas.getContext("2d", { willReadFrequently: true }),
      whole: make("div", { class: "panel" }, make("p", {}, title), make("div", { class: "picture" }, canvas, frame)) };
  };

  const load = async source => {
    const image = new Image();
    image.src = source;
    await image.decode();
    return image;
  };

  const swatch = color => make("span", { class: "swatch", style: `background: ${color}` });
  const rgb = color => [1, 3, 5].map(at => parseInt(color.slice(at, at + 2), 16));

  // ---------------------------------------------------------------- equations 3 to 5

  // Equation 3 in the float32 of `thresholds`, operation by operation.
  const float = Math.fround;
  const threshold = (peak, chi, zeta, beta) => {
    const discount = -float(Math.expm1(float(-float(chi) / float(beta))));
    return float(float(float(zeta) * discount) * peak);
  };

  const thresholdFigure = async data => {
    const dominant = bytes(data.dominant), confidence = Float32Array.from(bytes(data.confidence), x => x / 255);
    const peak = data.names.map(() => 0), predicted = data.names.map(() => 0);
    dominant.forEach((c, pixel) => {
      peak[c] = Math.max(peak[c], confidence[pixel]);
      predicted[c] += 1;
    });
    const present = data.names.map((_, c) => c).filter(c => predicted[c]);
    let now = structuredClone(data.start);

    const photo = panel("image", data.size, data.alt);
    photo.context.drawImage(await load(data.image), 0, 0);
    const colors = photo.context.getImageData(0, 0, data.size[1], data.size[0]).data;
    const labels = panel("accepted pixels in the colours of their classes", data.size, "");
    const picture = labels.context.createImageData(data.size[1], data.size[0]);
    const shades = data.colors.map(rgb);

    const choice = make("select", { name: "class", autocomplete: "off" },
      ...present.map(c => make("option", { value: c }, data.names[c])));
    const sliders = {
      chi: slider("chi", "its prior χ", data.priors.length, 0, k => String(data.priors[k]),
        k => { now.chi[now.class] = k; draw(); }),
      zeta: slider("zeta", "ζ", data.zetas.length, now.zeta, k => data.zetas[k].toFixed(2), k => { now.zeta = k; draw(); }),
      beta: slider("beta", "β", data.betas.length, now.beta, k => String(data.betas[k]), k => { now.beta = k; draw(); }),
    };
    choice.addEventListener("change", () => { now.class = Number(choice.value); settle(); });
    const curve = make("svg", { viewBox: "0 0 400 232", role: "img" });
    const summary = make("p", { class: "summary", role: "status" });
    const rows = make("tbody");
    const heads = ["class", "prior χ", "θ", "accepted", "predicted"].map(text => make("th", { scope: "col" }, text));
    const table = make("table", { class: "counts" }, make("thead", {}, make("tr", {}, ...heads)), rows);

    const settle = () => {                     // all controls where `now` says
      choice.value = now.class;
      sliders.chi.set(now.chi[now.class]);
      sliders.zeta.set(now.zeta);
      sliders.beta.set(now.beta);
      draw();
    };

    const draw = () => {
      const zeta = data.zetas[now.zeta], beta = data.betas[now.beta];
      const limits = peak.map((value, c) => threshold(value, data.priors[now.chi[c]], zeta, beta));
      const kept = data.names.map(() => 0);
      dominant.forEach((c, pixel) => {
        const passes = confidence[pixel] > limits[c];                 // equation 5
        if (passes) kept[c] += 1;
        const at = 4 * pixel, gray = .13 * (colors[at] + colors[at + 1] + colors[at + 2]);
        picture.data.set([...passes ? shades[c] : [gray, gray, gray], 255], at);
      });
      labels.context.putImageData(picture, 0, 0);
      const all = kept.reduce((a, b) => a + b);
      summary.textContent = `${all} of ${dominant.length} pixels are accepted (${percent(all, dominant.length)}), `
        + `${kept[now.class]} of ${predicted[now.class]} of the class ${data.names[now.class]}.`;
      labels.canvas.setAttribute("aria-label", `Pixels that are accepted, in the colours of their classes; the others dark. ${summary.textContent}`);
      rows.replaceChildren(...present.map(c => {
        const texts = [String(data.priors[now.chi[c]]), limits[c].toFixed(3), kept[c], predicted[c]];
        const name = make("th", { scope: "row" }, swatch(data.colors[c]), data.names[c]);
        const cells = texts.map(text => make("td", {}, String(text)));
        cells[2].setAttribute("style", `--share: ${100 * kept[c] / predicted[c]}%; --color: ${data.colors[c]}`);
        return make("tr", { "data-class": c, ...c === now.class && { "aria-current": "true" } }, name, ...cells);
      }));
      drawCurve(zeta, beta, limits);
    };

    // The threshold over the prior: the curve of the chosen class, and the point of every class.
    const drawCurve = (zeta, beta, limits) => {
      const [left, right, top, bottom] = [44, 390, 12, 186];
      const [low, high] = [data.priors[0], data.priors.at(-1)].map(Math.log10);
      const x = chi => left + (right - left) * (Math.log10(chi) - low) / (high - low);
      const y = value => bottom - (bottom - top) * value;
      const line = (x1, y1, x2, y2, kind) => make("line", { x1, y1, x2, y2, class: kind });
      const text = (x, y, words, anchor = "middle") => make("text", { x, y, "text-anchor": anchor }, words);
      const parts = [line(left, bottom, right, bottom, "axis"), line(left, bottom, left, top, "axis")];
      for (const value of [0, .25, .5, .75, 1]) parts.push(line(left - 4, y(value), left, y(value), "axis"), text(left - 7, y(value) + 4, value, "end"));
      for (let power = Math.ceil(low - .01); power <= high + .01; power++) {
        const label = power > -3 ? String(+(10 ** power).toPrecision(1)) : ["0.00001", "0.0001", "0.001"][power + 5];
        parts.push(line(x(10 ** power), bottom, x(10 ** power), bottom + 4, "axis"), text(x(10 ** power), bottom + 18, label));
      }
      parts.push(text((left + right) / 2, bottom + 40, "class prior χ"));
      parts.push(make("text", { x: left + 8, y: top + 4 }, `threshold θ of ${data.names[now.class]}`));
      const best = peak[now.class];
      parts.push(line(left, y(zeta * best), right, y(zeta * best), "bound"));
      const points = data.priors.map(chi => `${x(chi).toFixed(1)},${y(threshold(best, chi, zeta, beta)).toFixed(1)}`);
      parts.push(make("path", { d: `M${points.join("L")}`, class: "curve" }));
      const order = [...present.filter(c => c !== now.class), now.class];
      for (const c of order) {
        const chosen = c === now.class;
        parts.push(make("circle", { cx: x(data.priors[now.chi[c]]), cy: y(limits[c]), r: chosen ? 7 : 4, fill: data.colors[c], class: chosen ? "chosen" : "other" }));
      }
      curve.replaceChildren(...parts);
      curve.setAttribute("aria-label", `Threshold over class prior for ${data.names[now.class]}: it rises from 0 to ${(zeta * best).toFixed(2)}. `
        + `At the prior ${data.priors[now.chi[now.class]]} it is ${limits[now.class].toFixed(3)}.`);
    };

    const reset = button("Reset", () => { now = structuredClone(data.start); settle(); });
    settle();
    return [
      make("div", { class: "controls" }, make("label", { class: "control" }, make("span", {}, "class"), choice),
        ...["chi", "zeta", "beta"].map(name => sliders[name].row), reset),
      make("div", { class: "two" }, curve, make("div", { class: "stack" }, photo.whole, labels.whole)),
      summary, table];
  };

  // ---------------------------------------------------------------- a crop, and its fusion

  const cropFigure = async data => {
    const [H, W] = data.size, [rows, columns] = data.grid;
    const counts = new Uint16Array(bytes(data.counts).buffer);        // of pixels: with a label, and three times wrong
    const [image, whole, crops, fusions] = await Promise.all([data.image, data.whole, data.crops, data.fusions].map(load));
    const photo = panel("image: move the frame", data.size, "");
    const teacher = panel("the whole image, by itself", data.size, "Label map that the network gives for the whole image");
    const view = panel("the crop, by itself, enlarged", data.size, "");
    const fused = panel("both, fused", data.size, "");
    photo.context.drawImage(image, 0, 0);
    teacher.context.drawImage(whole, 0, 0);
    let now = structuredClone(data.start);

    const place = () => {                      // the crop that is nearest: its number, and its box
      const [height, width] = data.crop_sizes[now.zoom];
      const top = Math.round((H - height) * now.row / (rows - 1)), left = Math.round((W - width) * now.column / (columns - 1));
      return { number: (now.zoom * rows + now.row) * columns + now.column, top, left, height, width };
    };
    const say = { zoom: k => `${(H / data.crop_sizes[k][0]).toFixed(1)} ×`,
      column: k => `${k + 1} of ${columns}`, row: k => `${k + 1} of ${rows}` };
    const titles = { zoom: "zoom", column: "left to right", row: "top to bottom" };
    const steps = { zoom: data.crop_sizes.length, column: columns, row: rows };
    const sliders = Object.fromEntries(Object.keys(say).map(name =>
      [name, slider(name, titles[name], steps[name], now[name], say[name], k => { now[name] = k; draw(); })]));
    const summary = make("p", { class: "summary", role: "status" });

    const draw = () => {
      const { number, top, left, height, width } = place();
      const across = number % columns, down = Math.floor(number / columns);
      view.context.drawImage(crops, across * W, down * H, W, H, 0, 0, W, H);
      fused.context.drawImage(whole, 0, 0);
      const [high, wide] = data.crop_sizes.at(-1);                    // of a tile
      fused.context.drawImage(fusions, across * wide, down * high, width, height, left, top, width, height);
      for (const { frame } of [photo, teacher, fused]) {
        frame.hidden = false;
        frame.style.cssText = `left: ${100 * left / W}%; top: ${100 * top / H}%; width: ${100 * width / W}%; height: ${100 * height / H}%`;
      }
      const [known, ...wrong] = counts.subarray(4 * number, 4 * number + 4);
      const [one, two, three] = wrong.map(count => percent(count, known));
      const where = `${height} × ${width} pixels, ${top} from the top and ${left} from the left`;
      summary.textContent = `Crop of ${where}. Wrong pixels within it: whole image ${one}, crop ${two}, fused ${three}.`;
      photo.canvas.setAttribute("aria-label", `${data.alt}; on it the frame of the crop`);
      view.canvas.setAttribute("aria-label", `Label map that the network gives for the crop of ${where}: ${two} of its pixels are wrong`);
      fused.canvas.setAttribute("aria-label", `Label map of the whole image after the fusion with the crop: ${three} of the pixels in the frame are wrong`);
    };
    const settle = () => { for (const name in sliders) sliders[name].set(now[name]); draw(); };

    // Mouse, pen and one finger move the crop, two fingers zoom.
    const fingers = new Map(), target = photo.whole.querySelector(".picture");
    let grip, apart;
    const at = event => {
      const box = photo.canvas.getBoundingClientRect();
      return [(event.clientY - box.top) * H / box.height, (event.clientX - box.left) * W / box.width];
    };
    const spread = () => {
      const [[y, x], [v, u]] = fingers.values();
      return Math.hypot(y - v, x - u);
    };
    const nearest = (free, offset, count) => free ? Math.min(count - 1, Math.max(0, Math.round(offset / free * (count - 1)))) : 0;
    target.classList.add("handle");
    target.addEventListener("pointerdown", event => {
      const [y, x] = at(event), { top, left, height, width } = place();
      const inside = y >= top && y < top + height && x >= left && x < left + width;
      target.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, [y, x]);
      grip = inside ? [y - top, x - left] : [height / 2, width / 2];
      if (fingers.size === 2) apart = spread();
      move(event);
    });
    const move = event => {
      if (!fingers.has(event.pointerId)) return;
      const [y, x] = at(event);
      fingers.set(event.pointerId, [y, x]);
      if (fingers.size === 2) {
        const wider = spread() / apart, step = wider > 1.25 ? -1 : wider < .8 ? 1 : 0;
        if (step) apart = spread();
        now.zoom = Math.min(data.crop_sizes.length - 1, Math.max(0, now.zoom + step));
      } else {
        const { height, width } = place();
        now.row = nearest(H - height, y - grip[0], rows);
        now.column = nearest(W - width, x - grip[1], columns);
      }
      settle();
    };
    target.addEventListener("pointermove", move);
    for (const end of ["pointerup", "pointercancel"]) target.addEventListener(end, event => fingers.delete(event.pointerId));

    const reset = button("Reset", () => { now = structuredClone(data.start); settle(); });
    settle();
    const legend = data.legend.map(c => make("span", {}, swatch(data.colors[c]), data.names[c]));
    return [
      make("div", { class: "controls" }, ...["zoom", "column", "row"].map(name => sliders[name].row), reset),
      make("div", { class: "two maps" }, photo.whole, fused.whole, teacher.whole, view.whole),
      make("p", { class: "legend" }, ...legend), summary];
  };

  // ---------------------------------------------------------------- in the place of the picture

  const figures = { threshold: thresholdFigure, crop: cropFigure };
  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll("script.handled").forEach(async script => {
      const image = script.previousElementSibling.querySelector(".cell_output img");
      const data = { ...JSON.parse(script.textContent), alt: image.alt };
      const parts = await figures[data.kind](data);
      const figure = make("div", { class: "handled", role: "group", "aria-label": data.title }, ...parts);
      image.hidden = true;
      image.before(figure);
    });
  });
})();
