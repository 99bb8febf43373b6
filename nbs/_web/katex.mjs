// Render equations at build time: a JSON list of {tex, display} in, a JSON list of HTML out.
// An equation that KaTeX cannot read stops the build; a page never shows one in red.
import katex from "katex";
import { readFileSync } from "node:fs";

const equations = JSON.parse(readFileSync(0, "utf8"));
const failures = [];
const html = equations.map(({ tex, display, where }) => {
  try {
    return katex.renderToString(tex, { displayMode: display, throwOnError: true, strict: "ignore", output: "htmlAndMathml" });
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
