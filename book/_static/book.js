/* What the pages do: menu, light and dark, contents that follow the text, the reader's
   place in the book, copying, printing. */
"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector) => [...document.querySelectorAll(selector)];

  // Search summaries are fetched, which browsers refuse on pages opened from a file.
  if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS === "object") {
    DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
  }

  // Light or dark: as the system has it, until the reader chooses.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () =>
    root.dataset.theme === "dark" || (root.dataset.theme !== "light" && system.matches);
  const theme = document.querySelector(".theme");
  const label = () => {
    const text = dark() ? "Switch to light" : "Switch to dark";
    theme.setAttribute("aria-label", text);
    theme.title = text;
  };
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    localStorage.setItem("book-theme", root.dataset.theme);
    label();
  });
  system.addEventListener("change", label);
  label();

  // The menu on small screens.
  const menu = document.querySelector(".menu");
  const sidebar = document.getElementById("sidebar");
  const open = (state) => {
    root.classList.toggle("menu-open", state);
    menu.setAttribute("aria-expanded", state);
    if (state) sidebar.querySelector("a").focus();
  };
  menu.addEventListener("click", () => open(!root.classList.contains("menu-open")));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && root.classList.contains("menu-open")) {
      open(false);
      menu.focus();
    }
  });
  document.addEventListener("click", (event) => {
    if (!sidebar.contains(event.target) && !menu.contains(event.target)) {
      if (root.classList.contains("menu-open")) open(false);
    }
  });
  sidebar.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });

  // Contents: open where there is room beside the text, and following it. A notebook's
  // address and section are the reader's place in the book.
  const contents = document.querySelector(".contents");
  const notebook = document.body.matches(".notebook");
  if (contents) {
    const wide = matchMedia("(min-width: 75.01rem)");
    const adapt = () => (contents.open = wide.matches);
    wide.addEventListener("change", adapt);
    adapt();
    const links = new Map(
      [...contents.querySelectorAll("a[href^='#']")].map((a) => [
        document.getElementById(decodeURIComponent(a.hash.slice(1))),
        a,
      ]),
    );
    const sections = all("article > section > section").filter((s) => links.has(s));
    let last;
    const follow = () => {
      const passed = sections.findLast((s) => s.getBoundingClientRect().top < 120);
      const here = links.get(passed) ?? null;
      if (here === last) return;
      last?.removeAttribute("aria-current");
      here?.setAttribute("aria-current", "true");
      last = here;
      if (notebook) {
        const place = [location.pathname, here?.hash, here?.textContent];
        localStorage.setItem("book-place", place.join("\n"));
      }
      if (here && wide.matches) {
        contents.scrollTop = here.offsetTop - contents.clientHeight / 2;
      }
    };
    addEventListener("scroll", () => requestAnimationFrame(follow), { passive: true });
    follow();
  }

  // The welcome page offers to go on from there.
  const [page, hash, section] = (localStorage.getItem("book-place") ?? "").split("\n");
  const chapter = all("#sidebar nav a").find((a) => a.pathname === page);
  if (chapter && document.body.matches(".welcome")) {
    const link = document.createElement("a");
    link.href = chapter.href + hash;
    link.append("Go on with " + chapter.textContent.replace(/^(\d+b?)\. /, "chapter $1: "));
    if (section) link.append(document.createElement("small"));
    if (section) link.lastChild.textContent = section;
    const row = document.createElement("span");
    row.className = "go-on";
    row.append(link);
    document.querySelector("h1 + p + p").prepend(row);
  }

  // Copying: code, and links to headings.
  const status = document.querySelector("[role=status]");
  const copy = async (text, done, undone) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      return;
    }
    done();
    status.textContent = "Copied";
    setTimeout(() => {
      undone();
      status.textContent = "";
    }, 1500);
  };
  if (navigator.clipboard) {
    all(".headerlink").forEach((link) => {
      link.title = "Copy the link to this place";
      link.setAttribute("aria-label", "Copy link");
      link.addEventListener("click", () =>
        copy(
          link.href,
          () => link.classList.add("copied"),
          () => link.classList.remove("copied"),
        ),
      );
    });
    all(".cell_input .highlight, article section > div[class*=highlight-] .highlight")
      .forEach((block) => {
        const button = document.createElement("button");
        button.className = "copy";
        button.type = "button";
        button.textContent = "Copy";
        button.addEventListener("click", () =>
          copy(
            block.querySelector("pre").textContent,
            () => (button.textContent = "Copied"),
            () => (button.textContent = "Copy"),
          ),
        );
        block.append(button);
      });
  }

  // Folded cells, all at once; print shows those that are open.
  const unfold = document.querySelector(".unfold");
  unfold?.addEventListener("click", () => {
    const cells = all("details.hide");
    const state = cells.some((cell) => !cell.open);
    cells.forEach((cell) => (cell.open = state));
    unfold.textContent = state ? "Fold all code" : "Unfold all code";
  });
  document.querySelector(".print")?.addEventListener("click", async () => {
    all("img").forEach((image) => (image.loading = "eager"));
    await Promise.allSettled(all("img").map((image) => image.decode()));
    print();
  });

  // What scrolls sideways can be reached from the keyboard, and only that.
  const reachable = () =>
    all("pre, .wide, .formula > div").forEach((box) => {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    });
  addEventListener("resize", reachable);
  addEventListener("toggle", reachable, true);
  document.fonts.ready.then(reachable);
})();
