"""What mkdocs is to do with a page beside rendering it; never part of the site."""

import re
from html import unescape
from typing import Any

FORMULA = re.compile(r'(class="arithmatex")')
PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)
LONGEST = 200
SHORT_CODE = re.compile(r"<code>([^<\n]{1,24})</code>")


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Give the page a description, keep formulas out of the search index, mark short code.

    The description is the first paragraph, unless the page has one. Results of a search show
    text as it was written: a formula would stand there as LaTeX. Short code is not broken into
    lines, which a browser would do after the hyphens of an option.
    """
    first = PARAGRAPH.search(html)
    if first is not None and "description" not in page.meta:
        text = " ".join(unescape(re.sub(r"<[^>]+>", "", first[1])).split())
        if "\\(" not in text:
            whole = text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " …"
            page.meta["description"] = whole.replace('"', "'")
    html = FORMULA.sub(r"\1 data-search-exclude", html)
    return SHORT_CODE.sub(r'<code class="short">\1</code>', html)
