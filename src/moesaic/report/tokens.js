// Colours the sample's tokens by their experts, neurons or loss, and shows what is known of one token.
"use strict";
for (const root of document.querySelectorAll(".routing")) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const body = root.querySelector(".text-body"), panel = root.querySelector(".panel");
  const chips = root.querySelector(".chips"), mode = root.querySelector("select");
  const slider = root.querySelector("input"), shown = root.querySelector("output");
  const spans = [...body.querySelectorAll(".token")];
  let pinned = -1;

  const hue = (e, count) => (count <= 12 ? (360 * e) / count : (e * 137.508) % 360);
  const colour = (e, count) => `hsl(${hue(e, count).toFixed(0)} 70% 50% / .38)`;
  const heat = (strength, warm) => `hsl(${warm ? 18 : 210} 75% 50% / ${(0.6 * Math.min(Math.abs(strength), 1)).toFixed(3)})`;
  const layer = () => data.layers[Number(slider.value)];
  const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(values.length, 1);

  function tint(place) {
    const here = layer();
    if (mode.value === "expert") return here.choices ? colour(here.choices[place][0], here.experts) : "transparent";
    if (mode.value === "share") {
      const all = here.share, low = Math.min(...all), high = Math.max(...all);
      return heat(high > low ? (all[place] - low) / (high - low) : 0.5, false);
    }
    const own = data.nll[place];
    if (own === null) return "transparent";
    const change = data.dense ? own - data.dense[place] : own / 4;
    return heat(change / 2, change > 0);
  }

  function paint() {
    shown.textContent = layer().name;
    slider.closest("label").style.visibility = mode.value === "loss" ? "hidden" : "visible";
    spans.forEach((span, place) => { span.style.backgroundColor = tint(place); span.classList.remove("faint"); });
    chips.replaceChildren();
    const here = layer();
    if (mode.value !== "expert" || !here.choices || here.experts > 64) return;
    const counts = Array(here.experts).fill(0);
    here.choices.forEach((chosen) => chosen.forEach((e) => (counts[e] += 1)));
    counts.forEach((count, e) => {
      const chip = document.createElement("span");
      chip.className = "chip";
      chip.style.backgroundColor = colour(e, here.experts);
      chip.textContent = `expert ${e}: ${count}`;
      chip.onmouseenter = () => spans.forEach((s, p) => s.classList.toggle("faint", !here.choices[p].includes(e)));
      chip.onmouseleave = () => spans.forEach((s) => s.classList.remove("faint"));
      chips.append(chip);
    });
  }

  function cell(row, text, tag = "td") {
    const made = document.createElement(tag);
    made.textContent = text;
    row.append(made);
    return made;
  }

  function tell(place) {
    panel.replaceChildren();
    const head = document.createElement("h4");
    head.textContent = data.tokens[place].replaceAll(" ", "␣").replaceAll("\n", "↵") || "part of a character";
    panel.append(head);
    const line = document.createElement("div");
    const own = data.nll[place];
    line.textContent = own === null ? "The first token is not predicted."
      : `loss ${own.toFixed(2)}` + (data.dense ? `, dense ${data.dense[place].toFixed(2)} nats` : " nats");
    panel.append(line);
    const table = document.createElement("table"), top = table.insertRow();
    cell(top, "layer", "th").className = "text";
    cell(top, data.layers.some((each) => each.choices) ? "experts" : "", "th").className = "text";
    cell(top, "neurons", "th").className = "number";
    for (const each of data.layers) {
      const row = table.insertRow();
      cell(row, each.name).className = "text";
      const chosen = cell(row, "");
      chosen.className = "text";
      for (const e of each.choices ? each.choices[place] : []) {
        const chip = document.createElement("span");
        chip.className = "chip";
        chip.style.backgroundColor = colour(e, each.experts);
        chip.textContent = e;
        chosen.append(chip, " ");
      }
      cell(row, `${(100 * each.share[place]).toFixed(0)} %`).className = "number";
    }
    const foot = table.insertRow();
    cell(foot, "mean").className = "text";
    cell(foot, "");
    cell(foot, `${(100 * mean(data.layers.map((each) => each.share[place]))).toFixed(0)} %`).className = "number";
    panel.append(table);
  }

  spans.forEach((span, place) => {
    const show = () => { if (pinned < 0) tell(place); };
    span.onmouseenter = show;
    span.onfocus = show;
    span.onclick = () => {
      pinned = pinned === place ? -1 : place;
      spans.forEach((other, p) => other.classList.toggle("pinned", p === pinned));
      tell(place);
    };
    span.onkeydown = (event) => { if (event.key === "Enter") span.onclick(); };
  });
  mode.onchange = slider.oninput = paint;
  paint();
  const surprise = (place) => (data.nll[place] === null ? -Infinity : data.nll[place] - (data.dense ? data.dense[place] : 0));
  tell(spans.reduce((best, _, place) => (surprise(place) > surprise(best) ? place : best), 0));
}
document.documentElement.dataset.ready = "yes";
