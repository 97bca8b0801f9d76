type Child = Node | string | null | undefined;

/** An element with properties (`on...` handlers too; `aria-` and `data-` names become attributes) and children. */
export function h<K extends keyof HTMLElementTagNameMap>(tag: K, props: Record<string, unknown> = {}, ...children: Child[]) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props))
    if (name.includes("-") || name === "role") element.setAttribute(name, String(value));
    else (element as any)[name] = value;
  element.append(...children.filter(child => child != null) as (Node | string)[]);
  return element;
}

export function button(label: string, onclick: () => void, props: Record<string, unknown> = {}): HTMLButtonElement {
  return h("button", { type: "button", onclick, ...props }, label);
}
