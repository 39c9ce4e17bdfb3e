/* What the pages do: menu, light and dark, copy buttons, contents that follow the text. */
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
    try {
      localStorage.setItem("book-theme", root.dataset.theme);
    } catch {}
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
  sidebar.querySelector(".current > a")?.scrollIntoView({ block: "nearest" });

  // Contents: open where there is room beside the text, and following it.
  const contents = document.querySelector(".contents");
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
    const sections = [...links.keys()].filter((section) => section);
    const follow = () => {
      const passed = sections.filter((s) => s.getBoundingClientRect().top < 120);
      const here = links.get(passed.findLast((s) => links.get(s).offsetParent));
      if (here?.hasAttribute("aria-current")) return;
      links.forEach((a) => a.removeAttribute("aria-current"));
      here?.setAttribute("aria-current", "true");
      if (here && wide.matches) {
        contents.scrollTop = here.offsetTop - contents.clientHeight / 2;
      }
    };
    addEventListener("scroll", () => requestAnimationFrame(follow), { passive: true });
    follow();
  }

  // Copy buttons.
  if (navigator.clipboard) {
    all(".cell_input .highlight, article section > div[class*=highlight-] .highlight")
      .forEach((block) => {
        const button = document.createElement("button");
        button.className = "copy";
        button.type = "button";
        button.textContent = "Copy";
        button.addEventListener("click", async () => {
          await navigator.clipboard.writeText(block.querySelector("pre").textContent);
          button.textContent = "Copied";
          setTimeout(() => (button.textContent = "Copy"), 1500);
        });
        block.append(button);
      });
  }

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
