"""How a report looks: one style sheet, and the colours of the dark scheme.

The page's own colours are made of the figures' (`Theme`), so that both change together. Widths are
set by the text: at 400 pixels everything is one column, from 900 on figures stand in two.
"""

from __future__ import annotations

from decal.report.figures import Theme

DARK = Theme(
    ink="#e8edf2",
    muted="#9fabb8",
    grid="#303a45",
    card="#1b222a",
    mark="#5fd39a",
    series=(
        "#5cb3f2", "#ff9a66", "#45cfa6", "#e39bcb",
        "#e3bb55", "#b4c1ce", "#ff8a94", "#93d0f7",
    ),
)  # fmt: skip

CSS = """
:root{--font:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
--page:#f4f6f8;--soft:#f7f9fa;--warn:#8a4b00;--warn-soft:#fff5e6;--mark-soft:#e9f6ef}
@media (prefers-color-scheme:dark){:root{--page:#12171d;--soft:#222b34;--warn:#f3b562;
--warn-soft:#33291a;--mark-soft:#173026}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 var(--font)}
main{max-width:1180px;margin:0 auto;padding:28px 20px 56px}
header{margin-bottom:22px}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.015em;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.12rem;letter-spacing:-.005em;margin:0 0 4px}
h3{font-size:.95rem;margin:18px 0 6px;overflow-wrap:anywhere}
p{margin:0 0 8px;overflow-wrap:anywhere}
.sub,.lead,.note,figcaption{color:var(--muted)}
.sub{overflow-wrap:anywhere}
.lead,.note,figcaption{font-size:.9rem;max-width:75ch}
section{background:var(--card);border:1px solid var(--grid);border-radius:12px;
padding:18px 20px 20px;margin:0 0 16px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;
margin:0 0 16px}
.fact{min-width:0;overflow-wrap:anywhere;background:var(--card);
border:1px solid var(--grid);border-radius:12px;padding:12px 14px}
.fact b{display:block;font-size:1.3rem;line-height:1.25;font-weight:650;letter-spacing:-.01em;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.fact span{color:var(--muted);font-size:.82rem;display:block}
.advice{border-color:var(--mark);border-width:1px 1px 1px 4px}
.advice p{max-width:80ch}
.say{margin-bottom:10px;max-width:80ch}
.advice .say{font-size:1.1rem;line-height:1.45}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));
gap:14px 32px}
.figures>div{min-width:0}
figure{margin:6px 0 0;min-width:0}
figure svg{display:block;width:100%;max-width:520px;height:auto;font-family:var(--font)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:0 32px;
margin:6px 0 0;font-size:.9rem}
dl div{display:flex;justify-content:space-between;gap:14px;border-bottom:1px solid var(--grid);
padding:6px 0}
dt{color:var(--muted)}
dd{margin:0;text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:anywhere;min-width:0}
.scroll{overflow-x:auto;max-width:100%;-webkit-overflow-scrolling:touch}
.figures>div>.scroll,.figures h3{margin-top:6px}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 14px 6px 0;text-align:left;vertical-align:baseline;white-space:nowrap;
border-bottom:1px solid var(--grid);font-weight:400}
th:last-child,td:last-child{padding-right:4px}
thead th{color:var(--muted);font-size:.82rem;vertical-align:bottom;white-space:normal;
line-height:1.25}
tbody tr:last-child>*{border-bottom:0}
tbody th{font-weight:600;position:sticky;left:0;background:var(--card);padding-right:16px;
max-width:min(42vw,260px);overflow:hidden;text-overflow:ellipsis}
.n{text-align:right}
.m{text-align:center}
.marked>*{background:var(--mark-soft)!important}
.marked th{box-shadow:inset 3px 0 var(--mark);padding-left:10px}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
.hints{list-style:none;margin:8px 0 0;padding:0}
.hints li{border-left:3px solid var(--warn);background:var(--warn-soft);padding:9px 14px;
margin:0 0 8px;border-radius:0 8px 8px 0;overflow-wrap:anywhere}
.hints b{color:var(--warn)}
.hints p{margin:2px 0 0}
.warn{border-color:var(--warn);background:var(--warn-soft)}
.warn p:last-child{margin:0}
.sample{border-top:1px solid var(--grid);padding:14px 0 6px}
.sample:first-of-type{border-top:0}
pre{font:inherit;white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
.prompt{background:var(--soft);border-radius:8px;padding:9px 12px;margin:0 0 10px;font-size:.9rem;
max-height:14em;overflow-y:auto}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,118px),1fr));
gap:10px 14px}
.answer{min-width:0;font-size:.92rem}
.answer>span{display:block;color:var(--muted);font-size:.8rem;overflow-wrap:anywhere}
.right>span::after{content:" ✓";color:var(--mark)}
.right pre{color:var(--mark);font-weight:600}
.heat table{border-collapse:separate;border-spacing:2px}
.few table{width:100%;max-width:520px}
.few td.c{width:13%}
.heat th,.heat td{border:0;padding:3px 5px}
.heat tbody th{padding-right:8px;font-weight:400;z-index:1}
.heat td.c{position:relative;min-width:22px;height:24px;text-align:center;padding:3px 4px;
font-size:.76rem;border-radius:3px;overflow:hidden;background:var(--soft)}
.heat td.c i{position:absolute;inset:0;background:var(--c0);z-index:0}
.heat td.c span{position:relative;z-index:1}
.heat td.n{padding-left:12px}
.bars{display:grid;grid-template-columns:fit-content(38%) minmax(0,1fr);gap:6px 12px;
font-size:.88rem;align-items:center;max-width:760px}
.bars .name{overflow-wrap:anywhere;color:var(--muted)}
.bar{display:flex;align-items:center;gap:8px;min-width:0}
.bar i{display:block;height:14px;border-radius:3px;background:var(--c5);flex:none}
.bar i.m{background:var(--c0)}
.bar span{font-variant-numeric:tabular-nums;white-space:nowrap}
details{border-top:1px solid var(--grid);padding:10px 0 4px}
details:first-of-type{border-top:0}
summary{cursor:pointer;font-weight:600;overflow-wrap:anywhere}
code{font-family:var(--mono);font-size:.88em;overflow-wrap:anywhere}
footer{color:var(--muted);font-size:.85rem;padding:4px 4px 0;overflow-wrap:anywhere}
@media (max-width:520px){main{padding:18px 12px 40px}h1{font-size:1.4rem}
section{padding:14px 13px 16px}.fact:last-child:nth-child(odd){grid-column:1/-1}
.facts{grid-template-columns:repeat(2,minmax(0,1fr))}.fact b{font-size:1.12rem}}
@media print{body{background:#fff}section,.fact{break-inside:avoid}}
"""
