"""Files of the site that are not in docs/."""

from typing import NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File


class Generated(NamedTuple):
    """A file to add to the site.

    Args:
        address (`str`): Its path below docs/; one that ends with `.md` becomes a page.
        content (`str` or `bytes`): What it holds.
    """

    address: str
    content: str | bytes

    def as_page(self, config: MkDocsConfig) -> File:
        """The file as mkdocs takes it."""
        return File.generated(config, self.address, content=self.content)
