import "./theme.css";
import { render } from "preact";
import { embedded } from "./api";
import { PAGES } from "./pages";
import { href, route, theme, type Theme } from "./state";
import { Button } from "./ui/controls";
import { Icon, type IconName } from "./ui/icons";
import { Empty, Toasts } from "./ui/parts";

const THEMES: Record<Theme, { icon: IconName; next: Theme; words: string }> = {
  auto: { icon: "auto", next: "light", words: "Theme: as the system. Press for light" },
  light: { icon: "sun", next: "dark", words: "Theme: light. Press for dark" },
  dark: { icon: "moon", next: "auto", words: "Theme: dark. Press to follow the system" },
};

function TopBar() {
  const { icon, next, words } = THEMES[theme.value];
  return (
    <header class="topbar">
      <a class="brand" href="#/">
        <Icon name="logo" size={20} />
        vlmscope
      </a>
      {embedded === null && (
        <nav aria-label="Pages">
          {Object.entries(PAGES).map(([name, { title }]) =>
            title === undefined ? null : (
              <a key={name} href={href(name)} aria-current={current() === name ? "page" : undefined}>
                {title}
              </a>
            ),
          )}
        </nav>
      )}
      <div class="spacer" />
      <Button icon={icon} kind="quiet" aria-label={words} onClick={() => (theme.value = next)} />
    </header>
  );
}

const current = (): string => (embedded !== null ? "graph" : route.value.page || "graph");

function App() {
  const View = PAGES[current()]?.view;
  return (
    <>
      <TopBar />
      <main>
        {View ? (
          <View route={route.value} />
        ) : (
          <Empty icon="help" title="There is no such page">
            <p>
              <a href="#/">Go to the start</a>
            </p>
          </Empty>
        )}
      </main>
      <Toasts />
    </>
  );
}

const root = document.getElementById("app");
if (root !== null) render(<App />, root);
