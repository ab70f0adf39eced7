"""The identifiers of licenses that the Hugging Face Hub knows."""

from difflib import get_close_matches

_WITH_VERSIONS = {
    "afl": ("3.0",),
    "agpl": ("3.0",),
    "apache": ("2.0",),
    "artistic": ("2.0",),
    "bsd": ("2-clause", "3-clause", "3-clause-clear"),
    "bsl": ("1.0",),
    "cc-by": ("2.0", "2.5", "3.0", "4.0"),
    "cc-by-nc": ("2.0", "3.0", "4.0"),
    "cc-by-nc-nd": ("3.0", "4.0"),
    "cc-by-nc-sa": ("2.0", "3.0", "4.0"),
    "cc-by-nd": ("4.0",),
    "cc-by-sa": ("3.0", "4.0"),
    "cdla-permissive": ("1.0", "2.0"),
    "cdla-sharing": ("1.0",),
    "ecl": ("2.0",),
    "epl": ("1.0", "2.0"),
    "etalab": ("2.0",),
    "eupl": ("1.1", "1.2"),
    "gpl": ("2.0", "3.0"),
    "lgpl": ("2.1", "3.0", "lr"),
    "lppl": ("1.3c",),
    "mpl": ("2.0",),
    "ofl": ("1.1",),
    "osl": ("3.0",),
}
_OF_MODELS = (
    *("openrail", "openrail++", "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m"),
    *("creativeml-openrail-m", "deepfloyd-if-license", "fair-noncommercial-research-license", "h-research"),
    *("apple-amlr", "apple-ascl", "gemma", "grok2-community", "intel-research", "open-mdw"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
)
_OTHERS = (
    *("bsd", "c-uda", "cc", "cc0-1.0", "gfdl", "gpl", "isc", "lgpl", "mit", "ms-pl", "ncsa", "odbl", "odc-by", "pddl"),
    *("postgresql", "unlicense", "wtfpl", "zlib", "unknown", "other"),
)
LICENSES = frozenset(
    {f"{family}-{version}" for family, versions in _WITH_VERSIONS.items() for version in versions}
    | {*_OF_MODELS, *_OTHERS}
)


def check_license(license: str) -> None:  # noqa: A002, as the Hub calls it
    """Refuses a license that the Hub does not know.

    Args:
        license (`str`): Its identifier, such as `"apache-2.0"`.

    Raises:
        ValueError: It is none. The message names the nearest one.
    """
    if license not in LICENSES:
        nearest = get_close_matches(license.lower(), LICENSES, n=1)
        raise ValueError(
            f"`license={license!r}` is not a license identifier of the Hub: "
            + (f"did you mean {nearest[0]!r}? " if nearest else "")
            + "Such are apache-2.0, mit and cc-by-4.0. For any other license use 'other', and put its text into the "
            "file LICENSE beside the model."
        )
