"""mkdocs calls this: the README is the first page, and files of the tree that pages link to are in the site.

Pages link to each other and to files outside of docs/ as they lie in the tree, so that a link works on a code
host too. Such a file, of Python as a page that shows it, is in the site below tree/.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def source_of(uri: str) -> str:
    """The path in the tree of the page at `uri` of the site."""
    if uri == "index.md":
        return "README.md"
    if uri.startswith("tree/"):
        return uri.removeprefix("tree/").removesuffix(".py.md") + (".py" if uri.endswith(".py.md") else "")
    return f"docs/{uri}"


def uri_of(source: str) -> str:
    """Where the site has what lies at `source` in the tree."""
    if source == "README.md":
        return "index.md"
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return f"tree/{source}.md" if source.endswith(".py") else f"tree/{source}"


def target_of(link: str, source: str) -> str:
    """The path in the tree that a link on the page at `source` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def on_files(files, config):
    """Adds the README and, page after page, the files outside of docs/ that are linked."""
    nav = [source_of(uri) for uri in re.findall(r"(?:tree/\S+|index)\.md", str(config.nav))]
    todo = [*nav, *(source_of(file.src_uri) for file in files.documentation_pages())]
    seen = set()
    while todo:
        source = todo.pop()
        if source in seen or not (ROOT / source).is_file():
            continue  # one that is not there: mkdocs says which page asks for it
        seen.add(source)
        uri = uri_of(source)
        if files.get_file_from_path(uri) is None:
            files.append(_file(config, uri, source))
        if source.endswith(".md"):
            todo += [target_of(link, source) for link in LINK.findall((ROOT / source).read_text())]
    return files


def _file(config, uri, source):
    if not source.endswith(".py"):
        return File.generated(config, uri, abs_src_path=str(ROOT / source))
    code = (ROOT / source).read_text()
    return File.generated(config, uri, content=f"# {source}\n\n```python\n{code}```\n")


def on_page_markdown(markdown, page, config, files):
    """Turns links between places in the tree into links between places in the site."""
    uri, source = page.file.src_uri, source_of(page.file.src_uri)
    if source.endswith(".py"):
        return markdown

    def relative(match):
        return posixpath.relpath(uri_of(target_of(match[0], source)), posixpath.dirname(uri) or ".")

    return LINK.sub(relative, markdown)
