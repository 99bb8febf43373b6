// Open notebooks in a running JupyterLab, press Run All, and say what went wrong:
// node jupyterlab.mjs CHROMIUM NODE_MODULES BASE_URL TOKEN NOTEBOOKS_JSON
// Prints one JSON object: notebook -> { problems, cells, figures, equations, bars }.
import { createRequire } from "node:module";

const [, , executablePath, modules, base, token, notebooksJson] = process.argv;
const { chromium } = createRequire(modules + "/")("playwright-core");
const report = {};

const browser = await chromium.launch({
  executablePath,
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
});
const context = await browser.newContext({ viewport: { width: 1400, height: 1000 } });

async function until(what, check, seconds) {
  const end = Date.now() + 1000 * seconds;
  while (Date.now() < end) {
    if (await check()) return;
    await new Promise((r) => setTimeout(r, 300));
  }
  throw new Error(`${what}: not within ${seconds} s`);
}

async function kernelIdle(name) {
  const answer = await fetch(`${base}api/sessions?token=${token}`);
  const session = (await answer.json()).find((s) => s.path === name);
  return session && session.kernel.execution_state === "idle" && session.kernel.connections > 0;
}

for (const [number, name] of JSON.parse(notebooksJson).entries()) {
  const problems = [];
  const tab = await context.newPage();
  tab.on("pageerror", (e) => problems.push(`script error: ${e.message}`));
  let seen = {};
  try {
    // a workspace of its own: JupyterLab would reopen the notebook before this one
    await tab.goto(`${base}lab/workspaces/test-${number}/tree/${name}?token=${token}`, { waitUntil: "domcontentloaded" });
    await tab.waitForSelector(".jp-Notebook .jp-CodeCell", { timeout: 300_000 });
    // a Run All that comes before the kernel is ready is lost without a word
    await until("kernel", () => kernelIdle(name), 300);
    await tab.click(".lm-MenuBar-itemLabel:text-is('Run')");
    await tab.click(".lm-Menu-itemLabel:text-is('Run All Cells')");
    const prompts = () => tab.$$eval(".jp-CodeCell .jp-InputPrompt", (ps) => ps.map((p) => p.textContent.trim()));
    await until("start", async () => (await prompts()).some((p) => /^\[(\*|\d+)\]/.test(p)), 60);
    await until("end", async () => (await prompts()).every((p) => !p.includes("*")) && (await kernelIdle(name)), 240);
    // pictures are drawn after the kernel has gone idle, on a busy machine long after
    await until("pictures", () => tab.evaluate(() => [...document.querySelectorAll(".jp-OutputArea-output img")].some((i) => i.naturalWidth > 0)), 60);
    await tab.waitForTimeout(1000);
    seen = await tab.evaluate(() => {
      const all = (q) => [...document.querySelectorAll(q)];
      return {
        cells: all(".jp-CodeCell").length,
        ran: all(".jp-CodeCell .jp-InputPrompt").filter((p) => /\[\d+\]/.test(p.textContent)).length,
        errors: all('[data-mime-type="application/vnd.jupyter.error"]').map((e) => e.textContent.slice(-600)),
        figures: all(".jp-OutputArea-output img").filter((i) => i.naturalWidth > 0).length,
        bars: all(".jp-OutputArea-output").filter((o) => /\d+\/\d+\s\[/.test(o.textContent)).length,
        equations: all(".jp-MarkdownCell mjx-container").length,
        badEquations: all("mjx-merror, .MathJax_Error").length,
        raw: all(".jp-RenderedMarkdown p").filter((p) => /\$\$|\\begin\{|^:::/.test(p.textContent)).map((p) => p.textContent.slice(0, 80)),
      };
    });
    problems.push(...seen.errors);
    if (seen.badEquations) problems.push(`${seen.badEquations} equation(s) that MathJax cannot read`);
    if (seen.raw.length) problems.push(`raw text where an equation should be: ${seen.raw[0]}`);
  } catch (error) {
    problems.push(String(error));
  }
  report[name] = { ...seen, problems };
  await tab.close();
}

await browser.close();
process.stdout.write(JSON.stringify(report));
