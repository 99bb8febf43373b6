// Open the page to play with in Chromium: node play.mjs CHROMIUM NODE_MODULES FILE_URL ADDRESSES_JSON
// Prints one JSON object: what the page computes at each address, and a list of problems that a reader would meet.
import { createRequire } from "node:module";

const [, , executablePath, modules, url, addressesJson] = process.argv;
const { chromium } = createRequire(modules + "/")("playwright-core");
const problems = [];
const expect = (what, ok, seen = "") => ok || problems.push(`${what} ${seen === "" ? "" : JSON.stringify(seen)}`);

const browser = await chromium.launch({
  executablePath,
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
});

async function open(hash, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...options });
  const page = await context.newPage();
  page.on("console", (m) => ["error", "warning"].includes(m.type()) && problems.push(`console: ${m.text()}`));
  page.on("pageerror", (e) => problems.push(`script error: ${e.message}`));
  page.on("request", (r) => r.url().startsWith("data:") || r.url().split("#")[0] === url || problems.push(`asks for ${r.url()}`));
  await page.goto(url + hash);
  return page;
}

const state = (page) => page.evaluate(() => window.wave.state());
const near = (page, check, ms) => page.waitForFunction(check, null, { timeout: ms }).then(() => true, () => false);

// numbers
let page = await open("#scene=copy&in=12345678&t=3");
const computed = await page.evaluate((addresses) => addresses.map((address) => {
  const shown = window.wave.run(address), lists = (states) => states && states.map((h) => Array.from(h));
  const some = (states) => states && (states.length > 200 ? [lists(states).at(-1)] : lists(states)); // 784 x 4096 numbers are too many to print
  return { wave: some(shown.wave), bump: some(shown.bump), waveSays: shown.waveSays, bumpSays: shown.bumpSays, read: shown.read };
}), JSON.parse(addressesJson));

// an address is the whole state: what is written is what was read, and a view that is sent arrives
for (const hash of ["scene=copy&in=12345678&delay=33&turn=3&t=7&ring=2", "scene=copy&in=5&cut=4&t=50&ring=1&pace=2",
  "scene=ring&in=8I4E2&nu=0.75&cut=30&turn=-4&at=12&t=60&ring=1", "scene=digit&in=ZZZZZ5ff&cut=7&t=500&ring=3"]) {
  await page.goto("about:blank");
  await page.goto(`${url}#${hash}`);
  const written = await page.evaluate(() => [window.wave.address(), location.hash.slice(1)]);
  expect("an address does not survive:", written[0] === hash && written[1] === hash, written);
}
await page.evaluate(() => { location.hash = "#scene=ring&in=3&t=9&ring=1"; });
expect("a new address in the address bar is not followed", await near(page, () => window.wave.state().scene === "ring" && document.getElementById("clock").textContent.startsWith("9 "), 3000));
await page.evaluate(() => { location.hash = "#scene=copy&nu=fast"; });
expect("a damaged address says nothing", await near(page, () => /could not be read/.test(document.getElementById("copied").textContent), 3000));
await page.context().close();

// the claim, without a hand: within ten seconds one network has recalled everything and the other has not
page = await open("");
expect("it does not begin by itself", await near(page, () => window.wave.state().playing && window.wave.state().head > 3, 3000));
expect("the claim takes more than ten seconds", await near(page, () => /wave recalls 10 of 10\. The iRNN recalls [0-3];/.test(document.getElementById("status").textContent), 10_000));
const marks = await page.$$eval("#wave-says li, #bump-says li", (list) => list.map((li) => li.dataset.mark).join(""));
expect("the answers are not marked:", /^✓{10}[✓✗]{10}$/.test(marks) && (marks.match(/✗/g) || []).length > 6, marks);

// keyboard
await page.keyboard.press("Home");
expect("Home", (await state(page)).head === 0);
await page.keyboard.press("ArrowRight");
await page.keyboard.press("ArrowRight");
await page.keyboard.press("ArrowLeft");
expect("arrow keys step", (await state(page)).head === 1, (await state(page)).head);
for (const key of "4711") await page.keyboard.press(key);
let now = await state(page);
expect("typed numbers enter, one a step:", now.head === 4 && now.levels.join("") === "4711000000", now);
for (const key of "865432") await page.keyboard.press(key);
expect("the tenth number starts the clock", (await state(page)).playing);
await page.keyboard.press(" ");
expect("space pauses", !(await state(page)).playing);
await page.keyboard.press("End");
expect("what was typed is recalled", /wave recalls (9|10) of 10/.test(await page.textContent("#status")), await page.textContent("#status"));
await page.focus("#turn");
for (let i = 0; i < 2; i++) await page.keyboard.press("ArrowLeft");
now = await state(page);
expect("the turn's slider follows the keyboard, and the answers show at once:", now.turn === -2 && now.head === 50, now);
expect("a turn shifts the answers:", /2 ahead: 8 of 8 are, exactly/.test(await page.textContent("#status")), await page.textContent("#status"));
expect("two lines of Python:", (await page.textContent("#python")) === 'from wave_rnns.paper.play import run\nprint(run("scene=copy&in=4711865432&turn=-2"))', await page.textContent("#python"));
const unnamed = await page.$$eval("button, input, select, canvas", (all) => all.filter((e) => !e.closest("[hidden]") && !e.textContent.trim() && !e.getAttribute("aria-label") && !e.labels?.length).map((e) => e.id));
expect("without a name for a screen reader:", unnamed.length === 0, unnamed);

// the mouse: cut a ring, draw a digit, draw a curve
const box = async (id) => {
  await page.locator(id).scrollIntoViewIfNeeded();
  for (let last = ""; ; await page.waitForTimeout(100)) {  // a busy machine may still be laying the page out
    const now = await page.locator(id).boundingBox();
    if (JSON.stringify(now) === last) return now;
    last = JSON.stringify(now);
  }
};
let b = await box("#wave-ring");
await page.mouse.click(b.x + b.width * 0.88, b.y + b.height / 2);
expect("a click cuts the ring there:", Math.abs((await state(page)).cut - 12) <= 1, (await state(page)).cut);
await page.click("[data-scene=digit]");
b = await box("#pad");
const to = (x, y) => page.mouse.move(b.x + x * b.width, b.y + y * b.height, { steps: 6 });
await to(0.5, 0.2);
await page.mouse.down();
await to(0.48, 0.8);
await page.mouse.up();
expect("a drawing is read", await near(page, () => window.wave.state().playing && window.wave.state().levels.some((v) => v), 4000));
await page.keyboard.press("End");
expect("a stroke is a 1:", /says 1/.test(await page.textContent("#status")), await page.textContent("#status"));
await page.keyboard.press("7");
await page.keyboard.press("End");
expect("key 7 shows the example of a 7, and both networks say so:", /says 7, the iRNN 7/.test(await page.textContent("#status")), await page.textContent("#status"));
await page.click("[data-scene=ring]");
const over = async (x, y) => {  // where the canvas is now: while it plays, the text above it changes its height
  const { width, height } = await page.locator("#sketch").boundingBox();
  await page.locator("#sketch").hover({ position: { x: x * width, y: y * height }, force: true });
};
await over(0.1, 0.9);
await page.mouse.down();
await over(0.3, 0.5);
await over(0.5, 0.1);
await page.mouse.up();
const rises = () => { const l = window.wave.state().levels; return l[20] <= l[40] && l[40] < l[70]; };
expect("a curve that is drawn rises:", await near(page, rises, 4000), (await state(page)).levels.slice(10, 80));
await page.context().close();

// every scene, on a desk and on phones, in light and dark
const touch = { isMobile: true, hasTouch: true };
for (const [where, options] of [["desk", {}], ["phone", { viewport: { width: 360, height: 740 }, ...touch }], ["small phone", { viewport: { width: 320, height: 568 }, ...touch }]]) {
  for (const colorScheme of ["light", "dark"]) {
    for (const scene of ["copy&in=5861437824&t=50", "ring&in=8I4E2&nu=0.9&t=60&cut=30", "digit&in=ZZZZZZ5fffff&t=600"]) {
      page = await open(`#scene=${scene}`, { ...options, colorScheme });
      await page.evaluate(() => document.querySelector("details").open = true);
      const seen = await page.evaluate(() => {
        const numbers = (c) => c.match(/[\d.]+/g).map(Number);
        const light = (c) => { const [r, g, b] = numbers(c).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor, v = numbers(c); if (v.length === 3 || v[3] > 0) return c; } return "rgb(255, 255, 255)"; };
        const weak = [];
        for (const e of document.querySelectorAll("body *")) {
          if (!e.getClientRects().length || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || e.closest("script, style, option")) continue;
          const a = light(getComputedStyle(e).color), b = light(ground(e)), ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          if (ratio < 4.5) weak.push(`${e.textContent.trim().slice(0, 20)}: ${ratio.toFixed(2)}`);
        }
        const blank = [...document.querySelectorAll("canvas")].filter((c) => c.getClientRects().length && !c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some((v) => v)).map((c) => c.id);
        const low = [...document.querySelectorAll("button, select")].filter((e) => e.getClientRects().length && e.getBoundingClientRect().height < 24).length;
        return { weak, blank, low, wide: document.documentElement.scrollWidth - innerWidth };
      });
      const at = `${scene.split("&")[0]}, ${where}, ${colorScheme}:`;
      expect(`${at} scrolls sideways by`, seen.wide <= 0, seen.wide);
      expect(`${at} contrast below 4.5`, seen.weak.length === 0, seen.weak);
      expect(`${at} empty pictures`, seen.blank.length === 0, seen.blank);
      expect(`${at} buttons too small to touch`, seen.low === 0, seen.low);
      await page.context().close();
    }
  }
}

// touch
page = await open("#scene=copy&t=0", { viewport: { width: 360, height: 740 }, ...touch });
await page.tap("#keys button:nth-child(6)");
await page.tap("#keys button:nth-child(2)");
now = await state(page);
expect("a tap enters a number:", now.head === 2 && now.levels[0] === 6 && now.levels[1] === 2, now);
await page.context().close();

// who asked for less motion gets the result, and motion only on request
page = await open("", { reducedMotion: "reduce" });
await page.waitForTimeout(500);
now = await state(page);
expect("it moves although less motion was asked for:", !now.playing && now.head === 50, now);
await page.click("#play");
expect("the play button works all the same", await near(page, () => window.wave.state().head > 2, 3000));

await browser.close();
process.stdout.write(JSON.stringify({ computed, problems }));
