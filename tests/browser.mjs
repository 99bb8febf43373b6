// Look at a built site in Chromium: node browser.mjs CHROMIUM NODE_MODULES BASE_URL PAGES_JSON
// Prints one JSON list of problems; every page is looked at on a desk in light and in dark, and on a small phone.
import { createRequire } from "node:module";

const [, , executablePath, modules, base, pagesJson] = process.argv;
const { chromium } = createRequire(modules + "/")("playwright-core");
const pages = JSON.parse(pagesJson);
const problems = [];

const browser = await chromium.launch({
  executablePath,
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
});

const SIZES = { desk: { width: 1280, height: 900 }, phone: { width: 360, height: 740 } };

const LOOKS = ["desk light", "desk dark", "phone dark"];

// the text that stands out less than 4.5 to 1 from what is behind it (WCAG AA); runs inside the page
function faint() {
  const parse = (c) => {
    const n = (c.match(/-?[\d.]+(?:e-?\d+)?/g) ?? [0, 0, 0, 0]).map(Number);
    return c.startsWith("color(srgb") ? [255 * n[0], 255 * n[1], 255 * n[2], n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const grounds = new Map();
  const ground = (e) => {
    if (!e) return [255, 255, 255, 1];
    if (!grounds.has(e)) {
      const own = parse(getComputedStyle(e).backgroundColor);
      grounds.set(e, own[3] === 1 ? own : over(own, ground(e.parentElement)));
    }
    return grounds.get(e);
  };
  const opacity = (e) => (e ? Number(getComputedStyle(e).opacity) * opacity(e.parentElement) : 1);
  const seen = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || e.closest("script, style, .katex, .visually-hidden, .quarto-btn-toggle")) continue;
    const place = e.closest("pre") ? "pre" : e.parentElement.className;
    const key = `${e.tagName}.${e.className} in ${place}`;
    if (seen.has(key) || !e.getClientRects().length) continue;
    const behind = ground(e);
    const color = parse(getComputedStyle(e).color);
    const ink = over([...color.slice(0, 3), color[3] * opacity(e)], behind);
    const [high, low] = [light(ink), light(behind)].sort((a, b) => b - a);
    seen.set(key, (high + 0.05) / (low + 0.05));
  }
  return [...seen].filter(([, contrast]) => contrast < 4.5).map(([key, contrast]) => `${key}: ${contrast.toFixed(2)}`);
}

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
    font: document.fonts.check('16px "Source Serif 4 Variable"'),
    covered: [...document.querySelectorAll(".katex-display .tag")].filter(visible).filter((tag) => {
      const bases = [...tag.parentElement.querySelectorAll(":scope > .base")].map((e) => e.getBoundingClientRect().right);
      return Math.max(...bases) > tag.getBoundingClientRect().left + 1;
    }).length,
    wide: [...main.querySelectorAll("div.sourceCode pre, .cell-output pre, table, span.math.display, img")].filter(visible).filter((e) => {
      let box = e;
      while (box && box !== main && getComputedStyle(box).overflowX === "visible") box = box.parentElement;
      return box === main && e.getBoundingClientRect().right > main.getBoundingClientRect().right + 1;
    }).map((e) => e.tagName),
    contents: document.querySelector("details.on-this-page")?.getClientRects().length > 0,
    headings: document.querySelectorAll("#TOC a").length,
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
  for (const name of page.startsWith("api/") ? [LOOKS[0], LOOKS[2]] : LOOKS) {  // API pages are all alike
    where = name;
    const [size, colorScheme] = name.split(" ");
    await tab.setViewportSize(SIZES[size]);
    await tab.emulateMedia({ colorScheme });
    if (name === LOOKS[0]) {
      await tab.goto(base + page, { waitUntil: "load" });
      await tab.addStyleTag({ content: "* { transition: none !important }" });  // colours are measured, not their fading
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
    if (seen.wide.length) note(`wider than the page and cut off: ${seen.wide.join(", ")}`);
    if (seen.headings && (size === "phone") !== seen.contents) note(size === "phone" ? "no contents on a phone" : "two tables of contents");
    if (size === "desk") for (const text of await tab.evaluate(faint)) note(`too little contrast: ${text}`);
    if (!seen.font) note("the text's font is missing");
    if ((colorScheme === "dark") !== seen.background < 100) note(`background brightness ${seen.background}`);
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
for (const [words, page] of [["WaveRNN", "layer.html"], ["psMNIST", "pixel_mnist.html"], ["courant", "wave_equation.html"]]) {
  await tab.fill(".smalldocs-search input", words);
  await tab.waitForFunction((w) => document.querySelector(".search-result")?.textContent.toLowerCase().includes(w), words.toLowerCase(), { timeout: 5000 })
    .catch(() => problems.push(`search finds nothing for ${words}`));
  const found = await tab.$$eval(".search-result", (links) => links.map((a) => a.getAttribute("href").replace("./", "").split("#")[0]));
  if (found[0] !== page) problems.push(`search for ${words} finds first ${found[0]}, not ${page}`);
}
await tab.goto(base + "no/such/page.html", { waitUntil: "load" });
if (!(await tab.textContent("h1")).includes("no such page")) problems.push("an address that leads nowhere shows no 404 page");
if (!(await tab.evaluate(() => document.fonts.check('16px "Source Serif 4 Variable"')))) problems.push("the 404 page has no style deep in the site");
await tab.goto(base + "index.html", { waitUntil: "load" });
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
await tab.goto(base + "adding.html", { waitUntil: "load" });
await tab.tap("details.on-this-page > summary");
await tab.tap("details.on-this-page li:last-child a");
await tab.waitForFunction(() => location.hash && window.scrollY > 500, null, { timeout: 5000 }).catch(() => problems.push("the contents on a phone lead nowhere"));
await phone.close();

await browser.close();
process.stdout.write(JSON.stringify(problems));
