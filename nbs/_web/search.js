// What Fuse finds, in a reader's order: notebooks whose words these are, then the API. Fuse's guesses only where nothing matches.
window.Fuse = class extends window.Fuse {
  constructor(list, options) {
    super(list, options);
    this.list = list.map((entry) => ({
      entry,
      page: entry.href.split("#")[0],
      heading: `${entry.title} ${entry.section}`.toLowerCase(),
      text: entry.text.toLowerCase(),
    }));
    this.sections = new Map();
    for (const { page } of this.list) this.sections.set(page, (this.sections.get(page) ?? 0) + 1);
  }

  search(query, options) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const count = (text, word) => text.split(word).length - 1;
    const found = this.list.filter((e) => words.every((w) => e.heading.includes(w) || e.text.includes(w)));
    if (!found.length) return super.search(query, options);
    const pages = new Map();
    for (const e of found) {
      e.score = words.reduce((sum, w) => sum + 20 * count(e.heading, w) + count(e.text, w), 0);
      pages.set(e.page, [...(pages.get(e.page) ?? []), e]);
    }
    // a page is about what many of its sections mention
    const ranked = [...pages].map(([page, entries]) => {
      entries.sort((a, b) => b.score - a.score);
      const total = Math.log1p(entries.reduce((sum, e) => sum + e.score, 0));
      return { api: entries[0].entry.api, score: (total * entries.length) / (1 + this.sections.get(page)), best: entries.slice(0, 3) };
    });
    ranked.sort((a, b) => a.api - b.api || b.score - a.score);
    const named = found.filter((e) => e.entry.api && e.entry.section === query).slice(0, 1);
    const first = ranked.slice(0, 1).flatMap((p) => p.best);
    const rest = ranked.slice(1).flatMap((p) => p.best);
    const hits = [...new Set([...first, ...named, ...rest])];
    return hits.slice(0, options.limit).map((e) => ({ item: e.entry }));
  }
};
