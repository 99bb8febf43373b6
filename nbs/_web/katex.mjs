// Render equations at build time: a JSON list of {tex, display} in, a JSON list of HTML out.
// An equation that KaTeX cannot read stops the build; a page never shows one in red.
import katex from "katex";
import { readFileSync } from "node:fs";

const equations = JSON.parse(readFileSync(0, "utf8"));
const failures = [];

// a displayed equation that is too wide may break after \qquad and after a relation, but not after a plus
const breakable = (tex) => tex.replace(/\\q?quad(?![a-zA-Z])/g, "$&\\allowbreak ");
const keepSums = (html) =>
  html
    .replace(/(<span class="mbin">[^<]*<\/span><span class="mspace"[^>]*><\/span>)<\/span><span class="base">/g, "$1")
    .replaceAll("\\allowbreak ", "");

const html = equations.map(({ tex, display, where }) => {
  try {
    const options = { displayMode: display, throwOnError: true, strict: "ignore", output: "htmlAndMathml" };
    return display ? keepSums(katex.renderToString(breakable(tex), options)) : katex.renderToString(tex, options);
  } catch (error) {
    failures.push(`${where}: ${error.message}\n    ${tex}`);
    return "";
  }
});
if (failures.length) {
  console.error(failures.join("\n"));
  process.exit(1);
}
process.stdout.write(JSON.stringify(html));
