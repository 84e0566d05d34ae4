// A film of matrices that the reader moves through: <div class="decur-film" data-film="JSON">. No library, no network.
document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".decur-film").forEach((place, number) => {
  const {steps, size, common, film, titles} = JSON.parse(place.dataset.film), names = Object.keys(film);
  const make = (name, more = {}) => Object.assign(document.createElement(name), more);
  const choice = make("select", {id: `film-${number}-loss`}), told = make("p", {className: "film-told"});
  choice.append(...names.map(name => make("option", {textContent: name})));
  const slider = make("input", {type: "range", min: 0, max: steps.length - 1, value: 0, id: `film-${number}-step`});
  const step = make("output"), row = make("div", {className: "film-row"});
  const label = (text, of) => make("label", {textContent: text, htmlFor: of.id});
  const sheets = titles.map(title => {
    const box = make("div"), sheet = make("canvas", {width: size, height: size, role: "img"});
    row.append(box);
    box.append(sheet, make("div", {textContent: title}));
    box.style.setProperty("--common", `${100 * common / size}%`);
    sheet.setAttribute("role", "img");
    return sheet;
  });
  // White is 0, red 1, blue -1, as in the figures.
  const ink = v => [[33, 102, 172], [178, 24, 43]][+(v > 0)].map(c => Math.round(255 + (c - 255) * Math.min(1, Math.abs(v) / 100)));
  const mean = (c, from, to) => {
    let sum = 0;
    for (let i = from; i < to; i++) sum += c[i * size + i];
    return (sum / (to - from) / 100).toFixed(2).replace("-", "−");
  };
  const draw = () => {
    const frame = film[choice.value][slider.value];
    step.textContent = `step ${steps[slider.value]}`;
    slider.setAttribute("aria-valuetext", step.textContent);
    const texts = frame.map((c, k) => {
      const image = new ImageData(size, size), says = `${titles[k]}: common ${mean(c, 0, common)}, unique ${mean(c, common, size)}`;
      c.forEach((v, i) => image.data.set([...ink(v), 255], 4 * i));
      sheets[k].getContext("2d").putImageData(image, 0, 0);
      sheets[k].setAttribute("aria-label", `Matrix, mean of the diagonal, ${says}`);
      return says;
    });
    told.textContent = `Mean of the diagonal. ${texts.join("; ")}.`;
  };
  choice.oninput = slider.oninput = draw;
  const loss = make("div", {className: "film-controls"});
  loss.append(label("Loss", choice), choice, label("Step", slider), slider, step);
  place.replaceChildren(loss, row, told);
  draw();
}));
