// Two builds: the page of `task=serve` into assets/viewer, and (mode "single") one file with everything in
// it, single.html, into which Python puts a graph.
import { createHash } from "node:crypto";
import { existsSync, readFileSync, readdirSync, statSync } from "node:fs";
import { join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";

const here = fileURLToPath(new URL(".", import.meta.url));
const out = join(here, "../assets/viewer");
const SOURCES = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.js", "src"];

/** SHA-256 over names and contents of the sources, in order of their names: `tests/architecture` computes the same. */
function hashOfSources() {
  const files = [];
  const walk = (path) => (statSync(path).isDirectory() ? readdirSync(path).forEach((n) => walk(join(path, n))) : files.push(path));
  SOURCES.forEach((name) => walk(join(here, name)));
  const named = files.map((path) => [relative(here, path).split(sep).join("/"), path]).sort(([a], [b]) => (a < b ? -1 : 1));
  const hash = createHash("sha256");
  for (const [name, path] of named) hash.update(name).update("\0").update(readFileSync(path)).update("\0");
  return hash.digest("hex");
}

/** The licences of all packages that the page contains, as one text. */
function licences() {
  const lock = JSON.parse(readFileSync(join(here, "package-lock.json"), "utf8"));
  const parts = [];
  for (const [path, { dev, version, license }] of Object.entries(lock.packages)) {
    if (!path || dev) continue;
    const folder = join(here, path);
    const file = existsSync(folder) && readdirSync(folder).find((name) => /^(licen[sc]e|copying|ofl)/i.test(name));
    const text = file ? readFileSync(join(folder, file), "utf8").trim() : `License: ${license ?? "see the package"}`;
    parts.push(`${path.replace(/^node_modules\//, "")} ${version} (${license ?? "?"})\n\n${text}\n`);
  }
  return parts.join(`\n${"-".repeat(80)}\n\n`);
}

/** LICENSES.txt and SOURCES.sha256 next to the page. */
const records = {
  name: "records",
  generateBundle() {
    this.emitFile({ type: "asset", fileName: "LICENSES.txt", source: licences() });
    this.emitFile({ type: "asset", fileName: "SOURCES.sha256", source: hashOfSources() + "\n" });
  },
};

/** One HTML file: script and style inside, allowed by their hashes alone; `<!--DATA-->` is where Python puts the graph. */
const oneFile = {
  name: "one-file",
  enforce: "post",
  generateBundle(_, bundle) {
    const all = Object.values(bundle);
    const script = all.find((part) => part.type === "chunk").code.replaceAll("</script", "<\\/script").replaceAll("<!--", "<\\!--");
    const style = String(all.find((part) => part.fileName.endsWith(".css")).source);
    const sha = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
    const policy = `default-src 'none'; script-src ${sha(script)}; style-src ${sha(style)}; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'`;
    const html = [
      `<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">`,
      `<meta http-equiv="Content-Security-Policy" content="${policy}">`,
      `<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">`,
      `<title>vlmscope</title>\n<link rel="icon" href="data:,">\n<style>${style}</style>\n</head>\n<body>\n<div id="app"></div>`,
      `<noscript>This page draws graphs and needs JavaScript.</noscript>\n<!--DATA-->\n<script>${script}</script>\n</body>\n</html>\n`,
    ].join("\n");
    for (const name of Object.keys(bundle)) delete bundle[name];
    this.emitFile({ type: "asset", fileName: "single.html", source: html });
  },
};

export default defineConfig(({ mode }) => {
  const single = mode === "single";
  return {
    base: "./",
    oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
    plugins: [single ? oneFile : records],
    define: { __SINGLE__: JSON.stringify(single) },
    server: { proxy: { "/api": "http://127.0.0.1:8321" } },
    build: {
      outDir: out,
      emptyOutDir: !single,
      target: ["chrome123", "firefox128", "safari17.5"],
      assetsInlineLimit: single ? 1e8 : 0,
      modulePreload: single ? false : { polyfill: false },
      chunkSizeWarningLimit: 3000,
      rollupOptions: single
        ? { input: join(here, "src/main.tsx"), output: { format: "iife", inlineDynamicImports: true } }
        : {},
      cssCodeSplit: false,
    },
  };
});
