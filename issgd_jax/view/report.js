// Draws every chart in its place; colours are those of the style sheet, so that both themes and paper need no other.
const {config, charts} = JSON.parse(document.getElementById("charts").textContent);
for (const [id, spec] of Object.entries(charts)) {
  vegaEmbed(document.getElementById(id), spec, {config, renderer: "svg", actions: false})
    .catch((error) => console.error(id, error));
}
