"""The report's style sheet: one page, two appearances, from a phone to a wide screen."""

from __future__ import annotations

from recog_fast.evaluation.plots import FONT_STACK, Theme

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--background);color:var(--text);font:16px/1.55 FONT_STACK}
header,main,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:48px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.01em}
.lead{color:var(--muted);max-width:72ch;text-wrap:pretty;margin:0;font-size:1.05rem}
section{margin:40px 0 0;padding-top:28px;border-top:1px solid var(--grid)}
h2{font-size:1.25rem;margin:0 0 16px}
h3{font-size:1rem;margin:24px 0 4px}
.note{color:var(--muted);font-size:.875rem;margin:4px 0 12px;max-width:100ch;text-wrap:pretty}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-bottom:20px}
.tile{background:var(--surface);border-radius:10px;padding:14px 18px}
.tile .label,.tile .beside{color:var(--muted);font-size:.875rem}
.tile .number{font-size:2rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th:first-child{text-align:left;padding-left:0}
td:last-child,th:last-child{padding-right:0}
thead th{white-space:normal;font-size:.8125rem;font-weight:600;color:var(--muted);vertical-align:bottom}
tbody th{font-weight:600}
small{color:var(--muted)}
.baseline th,.baseline td{color:var(--muted);font-weight:400;font-size:.875rem;padding-top:4px;padding-bottom:8px}
.paired th,.paired td{border-bottom:0;padding-bottom:2px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:28px 36px;margin-top:20px}
figure{margin:0;min-width:0}
figcaption{font-size:.875rem;color:var(--muted);margin-bottom:6px}
figcaption b{color:var(--text);font-weight:600;margin-right:.35em}
.figures img{display:block;width:100%;height:auto}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,ITEM),1fr));gap:16px;margin:0 0 8px}
.gallery.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,WIDE),1fr))}
.item img{display:block;width:100%;height:auto;border-radius:6px}
.item figcaption{margin:6px 0 0;font-size:.8125rem}
.detail{display:block;font-variant-numeric:tabular-nums}
.detail b{font-weight:600;margin-left:.3em;white-space:nowrap}
.right{color:var(--genuine)}
.wrong{color:var(--impostor)}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:8px 36px}
dl{display:grid;grid-template-columns:minmax(7em,max-content) minmax(0,1fr);gap:4px 20px;margin:8px 0;font-size:.875rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
details dl{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.8125rem}
summary{cursor:pointer;color:var(--muted)}
footer{color:var(--muted);font-size:.8125rem;margin-top:48px;padding-bottom:40px}
@media(max-width:600px){
header,main,footer{padding:0 16px}
header{padding-top:28px}
h1{font-size:1.5rem}
.tiles{grid-template-columns:repeat(3,minmax(0,1fr));gap:8px}
.tile{padding:10px}
.tile .number{font-size:1.25rem}
.tile .label,.tile .beside{font-size:.75rem}
.tile .label span{display:block}
table{font-size:.8125rem}
th,td{padding:7px 3px}
td small{display:block}
thead th,.baseline th,.baseline td{font-size:.75rem}
.gallery{grid-template-columns:repeat(2,minmax(0,1fr));gap:12px}
.gallery.wide{grid-template-columns:1fr}
dl{grid-template-columns:minmax(0,1fr);gap:0}
dd{margin-bottom:6px}
}
@media print{section{break-inside:avoid}}
"""


def stylesheet(light: Theme, dark: Theme) -> str:
    """CSS with the themes' colours as custom properties, dark ones where the reader prefers them."""
    rules = _RULES.replace("FONT_STACK", FONT_STACK).replace("ITEM", "160px").replace("WIDE", "320px").strip()
    night = f"@media(prefers-color-scheme:dark){{:root{{{_tokens(dark)}}}}}"
    return f":root{{color-scheme:light dark;{_tokens(light)}}}{night}\n{rules}\n"


def _tokens(theme: Theme) -> str:
    names = ("background", "surface", "text", "muted", "grid", "genuine", "impostor")
    return "".join(f"--{name}:{getattr(theme, name)};" for name in names)
