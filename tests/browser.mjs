// Look at a built site in Chromium: node browser.mjs CHROMIUM NODE_MODULES BASE_URL PAGES_JSON
// Prints one JSON list of problems; every page is looked at on a desk and on a phone, in light and in dark.
import { createRequire } from "node:module";

const [, , executablePath, modules, base, pagesJson] = process.argv;
const { chromium } = createRequire(modules + "/")("playwright-core");
const pages = JSON.parse(pagesJson);
const problems = [];

const browser = await chromium.launch({
  executablePath,
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
});

const SIZES = { desk: { width: 1440, height: 900 }, phone: { width: 390, height: 844 } };

const LOOKS = ["desk light", "desk dark", "phone dark", "phone light"];

// what the page looks like now; runs inside the page
function measure() {
  const visible = (e) => e.getClientRects().length > 0;
  const main = document.querySelector("main");
  const body = getComputedStyle(document.body);
  const brightness = (c) => c.match(/[\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3;
  const raw = [...main.querySelectorAll("p, li, td")].filter(visible).filter((e) => {
    const copy = e.cloneNode(true);
    copy.querySelectorAll("code, pre, .katex").forEach((x) => x.remove());
    return /\\[([]|\\tag\{|\\frac|\$\$/.test(copy.textContent);
  });
  return {
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    broken: [...document.images].filter((i) => i.naturalWidth === 0).length,
    errors: document.querySelectorAll(".katex-error").length,
    raw: raw.map((e) => e.textContent.trim().slice(0, 80)),
    background: brightness(body.backgroundColor),
    ink: brightness(body.color),
    font: document.fonts.check('16px "Source Serif 4 Variable"'),
    covered: [...document.querySelectorAll(".katex-display .tag")].filter(visible).filter((tag) => {
      const bases = [...tag.parentElement.querySelectorAll(":scope > .base")].map((e) => e.getBoundingClientRect().right);
      return Math.max(...bases) > tag.getBoundingClientRect().left + 1;
    }).length,
    flat: [...document.querySelectorAll(".katex")].filter((e) => visible(e) && e.getBoundingClientRect().height < 4).length,
  };
}

async function look(tab, page) {
  let where = "";
  const note = (what) => problems.push(`${page}, ${where}: ${what}`);
  tab.removeAllListeners();
  tab.on("console", (m) => m.type() === "error" && note(`console: ${m.text()}`));
  tab.on("pageerror", (e) => note(`script error: ${e.message}`));
  tab.on("requestfailed", (r) => r.failure()?.errorText !== "net::ERR_ABORTED" && note(`request failed: ${r.url().slice(0, 200)}`));
  tab.on("response", (r) => r.status() >= 400 && note(`${r.status()} for ${r.url()}`));
  tab.on("request", (r) => {
    const url = r.url();
    if (!url.startsWith(base) && !url.startsWith("data:") && !url.startsWith("blob:")) note(`asks another host: ${url}`);
  });
  for (const name of LOOKS) {
    where = name;
    const [size, colorScheme] = name.split(" ");
    await tab.setViewportSize(SIZES[size]);
    await tab.emulateMedia({ colorScheme });
    if (name === LOOKS[0]) {
      await tab.goto(base + page, { waitUntil: "load" });
      await tab.evaluate(async () => {
        document.querySelectorAll("img").forEach((i) => (i.loading = "eager"));
        await document.fonts.ready;
        await Promise.all([...document.images].map((i) => i.decode().catch(() => {})));
      });
    }
    await tab.waitForFunction((dark) => document.documentElement.classList.contains("quarto-dark") === dark, colorScheme === "dark", { timeout: 5000 })
      .catch(() => note("does not follow the reader's colour scheme"));
    const seen = await tab.evaluate(measure);
    if (seen.overflow > 0) note(`scrolls sideways by ${seen.overflow} px`);
    if (seen.broken) note(`${seen.broken} picture(s) did not load`);
    if (seen.errors) note(`${seen.errors} equation(s) in red`);
    if (seen.flat) note(`${seen.flat} equation(s) without height`);
    if (seen.covered) note(`${seen.covered} equation(s) run into their numbers`);
    if (seen.raw.length) note(`raw LaTeX: ${seen.raw[0]}`);
    if (!seen.font) note("the text's font is missing");
    if ((colorScheme === "dark") !== seen.background < 100) note(`background brightness ${seen.background}`);
    if (Math.abs(seen.background - seen.ink) < 120) note(`too little contrast: ${seen.ink} on ${seen.background}`);
  }
}

const context = await browser.newContext({ viewport: SIZES.desk });
const reader = await context.newPage();
for (const page of pages) await look(reader, page);
await context.close();

// what a reader does: switch to dark and come back to it, search, open the menu on a phone, follow the contents
const desk = await browser.newContext({ viewport: SIZES.desk, colorScheme: "light" });
let tab = await desk.newPage();
const dark = () => tab.waitForFunction(() => document.documentElement.classList.contains("quarto-dark"), null, { timeout: 5000 });
await tab.goto(base + "index.html", { waitUntil: "load" });
await tab.click(".quarto-color-scheme-toggle");
await dark().catch(() => problems.push("the dark-mode button does nothing"));
await tab.reload({ waitUntil: "load" });
await dark().catch(() => problems.push("dark mode is forgotten at the next page"));
await tab.fill(".smalldocs-search input", "WaveRNN");
await tab.waitForSelector(".search-result", { timeout: 5000 }).catch(() => problems.push("search finds nothing for WaveRNN"));
const entries = await tab.$$eval("#quarto-sidebar a.sidebar-link[href$='.html']", (links) => links.map((a) => a.href));
if (entries.length < pages.length - 1) problems.push(`the sidebar lists ${entries.length} of ${pages.length} pages`);
await desk.close();

const phone = await browser.newContext({ viewport: SIZES.phone, isMobile: true, hasTouch: true });
tab = await phone.newPage();
await tab.goto(base + "index.html", { waitUntil: "load" });
await tab.tap(".quarto-btn-toggle");
await tab.waitForTimeout(400);
const menu = await tab.$eval("#quarto-sidebar", (e) => e.getBoundingClientRect().left);
if (menu < 0) problems.push("the menu does not open on a phone");
await phone.close();

await browser.close();
process.stdout.write(JSON.stringify(problems));
