"""Finding the code blocks of a page."""

from pathlib import Path

from tests.docs.blocks import read_blocks

PAGE = """# A page

    mot train small_clm \\
        --output_dir runs/clm

    mot inspect runs/clm

Text.

```python
x = 1

y = 2
```

<!-- not run: it needs a GPU -->
```python title="x"
x.cuda()
```

- a list

    that goes on

!!! note

    More text.

    ```bash
    make demo
    ```

<!-- not run: no reason for what comes after text -->
Text.

~~~text
    not code of its own
~~~
    still text
"""


def test_all_blocks_are_found_with_what_is_said_about_them() -> None:
    blocks = [(block.line, block.language, block.text, block.reason) for block in read_blocks(Path("x.md"), PAGE)]
    assert blocks == [
        (3, "", "mot train small_clm \\\n    --output_dir runs/clm\n\nmot inspect runs/clm", None),
        (11, "python", "x = 1\n\ny = 2", None),
        (18, "python", "x.cuda()", "it needs a GPU"),
        (30, "bash", "make demo", None),
        (37, "text", "    not code of its own", None),
    ]
