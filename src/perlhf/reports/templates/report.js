"use strict";
(() => {
  const PAGE = 6;
  const SHOWN_TURNS = 2;

  // All text reaches the page through textContent, so whatever a model wrote stays text.
  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children.filter((child) => child !== null && child !== ""));
    return made;
  }

  function number(value, signed) {
    if (value === null || value === undefined) return "–";
    const text = Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
    return (signed && value > 0 ? "+" : "") + text.replace("-", "−");
  }

  function marked(text, needle) {
    const words = element("div", "words");
    const lower = text.toLowerCase();
    let start = 0;
    // Lower case may change a text's length (İ); marks would then be misplaced, so there are none.
    if (needle && lower.length === text.length) {
      for (let at = lower.indexOf(needle); at >= 0; at = lower.indexOf(needle, start)) {
        words.append(text.slice(start, at), element("mark", "", text.slice(at, at + needle.length)));
        start = at + needle.length;
      }
    }
    words.append(text.slice(start));
    return words;
  }

  function turn([role, content], needle) {
    if (!role) return element("div", "turn plain", marked(content, needle));
    return element("div", "turn", element("div", "role", role), marked(content, needle));
  }

  function prompt(turns, needle) {
    const box = element("div", "turns");
    // The system message is mostly the same everywhere: it is folded away with the earlier turns.
    const spoken = turns.filter(([role], index) => role !== "system" || index === turns.length - 1);
    const shown = spoken.slice(-SHOWN_TURNS);
    const earlier = turns.filter((one) => !shown.includes(one));
    if (earlier.length) {
      const title = earlier.length === 1 ? "1 earlier message" : `${earlier.length} earlier messages`;
      const folded = element("details", "", element("summary", "", title), ...earlier.map((one) => turn(one, needle)));
      folded.open = Boolean(needle) && earlier.some(([, content]) => content.toLowerCase().includes(needle));
      box.append(folded);
    }
    box.append(...shown.map((one) => turn(one, needle)));
    return box;
  }

  function side(name, facts, text, needle, isResult) {
    const head = element("p", "side-head", element("b", "", name), ...facts.filter(Boolean));
    const words = text ? marked(text, needle) : element("div", "words faint", "(empty)");
    return element("div", isResult ? "side result" : "side", head, words);
  }

  function fact(name, value) {
    return value === null || value === undefined ? null : element("span", "", `${name} ${number(value)}`);
  }

  function change(row, scale) {
    const before = row[`${scale}_before`];
    const after = row[`${scale}_after`];
    return before === null || after === null ? null : after - before;
  }

  function verdict(difference) {
    return difference > 1e-9 ? "better" : difference < -1e-9 ? "worse" : "same";
  }

  const kinds = {
    pairs: {
      texts: (row) => [row.before, row.after, row.demonstration].filter((text) => text !== undefined),
      keep: (row, chosen) => {
        const difference = change(row, chosen.scale);
        return chosen.filter === "all" || (difference !== null && verdict(difference) === chosen.filter);
      },
      rank: {
        gain: (row, chosen) => change(row, chosen.scale),
        loss: (row, chosen) => negative(change(row, chosen.scale)),
        high: (row, chosen) => row[`${chosen.scale}_after`],
        low: (row, chosen) => negative(row[`${chosen.scale}_after`]),
      },
      card: (row, needle, chosen) => {
        const difference = change(row, chosen.scale);
        const signs = { better: ["up", "▲ "], worse: ["down", "▼ "], same: ["", ""] };
        const [className, sign] = difference === null ? ["", ""] : signs[verdict(difference)];
        const head = element("div", "card-head", element("span", "place", `Prompt ${row.place}`));
        if (difference !== null) head.append(element("span", className, `${sign}${number(difference, true)} ${chosen.scale}`));
        const sides = ["before", "after"].map((when) => {
          const facts = [fact("gold", row[`gold_${when}`]), fact("score", row[`score_${when}`])];
          return side(when === "before" ? "Before" : "After", facts, row[when], needle, when === "after");
        });
        if (row.demonstration !== undefined) sides.push(side("Demonstration", [], row.demonstration, needle, false));
        return [head, prompt(row.prompt, needle), element("div", "sides", ...sides)];
      },
    },
    rollouts: {
      texts: (row) => [row.completion],
      keep: (row, chosen) => chosen.filter === "all" || String(row.step) === chosen.filter,
      rank: {
        high: (row) => row.score,
        low: (row) => negative(row.score),
        kl: (row) => row.kl,
        long: (row) => row.tokens,
      },
      card: (row, needle) => {
        const place = `Step ${row.step}, prompt ${row.prompt_index}, sample ${row.sample_index}`;
        const head = element("div", "card-head", element("span", "place", place));
        const facts = [fact("score", row.score), fact("reward", row.reward), fact("KL", row.kl)];
        if (row.tokens !== null) facts.push(element("span", "", `${row.tokens} tokens`));
        if (row.ended === false) facts.push(element("span", "cut", "cut off, no end token"));
        const sides = element("div", "sides one", side("Completion", facts, row.completion, needle, true));
        return [head, prompt(row.prompt, needle), sides];
      },
    },
    ratings: {
      texts: (row) => [row.completion],
      keep: (row, chosen) => chosen.filter === "all" || row.label === (chosen.filter === "up"),
      rank: {
        high: (row) => row.score,
        low: (row) => negative(row.score),
        wrong: (row) => (row.label ? negative(row.score) : row.score),
      },
      card: (row, needle) => {
        const label = element("span", row.label ? "up" : "down", row.label ? "▲ thumbs up" : "▼ thumbs down");
        const known = typeof row.label === "boolean";
        const head = element("div", "card-head", element("span", "place", `Example ${row.place}`), known ? label : null);
        const sides = element("div", "sides one", side("Completion", [fact("score", row.score)], row.completion, needle, true));
        return [head, prompt(row.prompt, needle), sides];
      },
    },
  };

  function negative(value) {
    return value === null || value === undefined ? null : -value;
  }

  // Largest first; rows without a value come last, equal ones stay in their order.
  function ordered(rows, rank, chosen) {
    if (!rank) return rows;
    const keyed = rows.map((row) => [rank(row, chosen) ?? -Infinity, row]);
    return keyed.sort((a, b) => (b[0] === a[0] ? 0 : b[0] - a[0])).map(([, row]) => row);
  }

  function explore(root, { kind: name, rows }) {
    const kind = kinds[name];
    const controls = Object.fromEntries([...root.querySelectorAll("[data-control]")].map((one) => [one.dataset.control, one]));
    const cards = root.querySelector(".cards");
    const more = root.querySelector(".more");
    const found = root.querySelector(".found");
    const searchable = new Map(
      rows.map((row) => [row, [...row.prompt.map(([, content]) => content), ...kind.texts(row)].join("\n").toLowerCase()]),
    );
    let shown = PAGE;

    function chosen() {
      const values = Object.fromEntries(Object.entries(controls).map(([key, control]) => [key, control.value]));
      return { scale: "score", ...values, search: values.search.trim().toLowerCase() };
    }

    function draw() {
      const now = chosen();
      const kept = rows.filter((row) => kind.keep(row, now) && searchable.get(row).includes(now.search));
      const list = ordered(kept, kind.rank[now.sort], now);
      cards.replaceChildren(...list.slice(0, shown).map((row) => element("li", "card", ...kind.card(row, now.search, now))));
      found.textContent = list.length ? `${Math.min(shown, list.length)} of ${list.length} shown` : "Nothing matches.";
      more.hidden = shown >= list.length;
    }

    for (const control of Object.values(controls)) {
      control.addEventListener("input", () => {
        shown = PAGE;
        draw();
      });
    }
    more.addEventListener("click", () => {
      const first = shown;
      shown += 2 * PAGE;
      draw();
      const next = cards.children[first];
      if (next) {
        next.tabIndex = -1;
        next.focus({ preventScroll: true });
      }
    });
    draw();
  }

  function theme(button) {
    const system = matchMedia("(prefers-color-scheme: dark)");
    const root = document.documentElement;
    // Some browsers refuse storage to pages opened from a file; the choice then lasts as long as the page.
    const stored = (action) => {
      try {
        return action();
      } catch {
        return null;
      }
    };
    const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const label = () => (button.textContent = isDark() ? "Light page" : "Dark page");
    const kept = stored(() => localStorage.getItem("perlhf-theme"));
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      stored(() => localStorage.setItem("perlhf-theme", root.dataset.theme));
      label();
    });
    system.addEventListener("change", label);
    label();
  }

  theme(document.getElementById("theme"));
  const data = JSON.parse(document.getElementById("samples").textContent);
  for (const root of document.querySelectorAll("[data-samples]")) explore(root, data[root.dataset.samples]);
})();
