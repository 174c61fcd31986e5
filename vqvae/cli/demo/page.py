"""The page of `vqvae demo`, by Gradio, and the same functions for gradio_client.

All work takes turns, as torch uses all cores anyway: two users wait for each other, and neither sees what the other
has.
"""

import socket
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from vqvae.cli.demo import maps
from vqvae.cli.demo.answers import ANY_CLASS, Answers
from vqvae.cli.demo.service import MOST_ANSWERS, MOST_DREAMS, MOST_SAMPLES, MOST_TEXT, Service, as_picture
from vqvae.cli.demo.uploads import MOST_BYTES, MOST_SIDE, read_picture

THEME = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
# Pixels of a small image are squares, and not smeared.
CSS = """
img {image-rendering: pixelated}
.image-frame img {width: 100%; height: 100%; object-fit: contain}
#atlas .grid-container {grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)) !important}
@media (max-width: 700px) {.grid-container {grid-template-columns: repeat(3, 1fr) !important}}
.gradio-container {width: 100%; max-width: 1200px; margin: auto}
"""
_TURNS: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
_EXAMPLES = 6


class Page:
    """The page of a service.

    Args:
        service: what it shows.
        folder: for the files that it makes; whoever gave it removes it.
    """

    def __init__(self, service: Service, folder: Path):
        self.service, self.folder = service, folder
        self.answers = Answers(service, folder)
        self.channels = service.model.config.num_channels
        self.examples = []
        for number, image in enumerate(service.images[:_EXAMPLES]):
            path = folder / f"example-{number}.png"
            as_picture(image).save(path)
            self.examples.append(str(path))

    def blocks(self) -> gr.Blocks:
        """All tabs."""
        model, prior = self.service.model, self.service.prior
        height, width = model.size
        with gr.Blocks(title=f"{self.service.source}: codes, bits and samples", analytics_enabled=False) as page:
            gr.Markdown(
                f"# {self.service.source}\n`{type(model).__name__}` of {height}x{width} pixels in "
                f"{'grey' if self.channels == 1 else 'colour'}: {model.grid[0]}x{model.grid[1]} codes out of "
                f"{model.num_codes:,}, and a `{type(prior).__name__}` of them. A larger picture is cut into tiles."
            )
            for name, tab in {
                "Reconstruct": self._reconstruct_tab,
                "Sample": self._sample_tab,
                "Inpaint": self._inpaint_tab,
                "Compress": self._compress_tab,
                "Dream": self._dream_tab,
                "Codebook": self._codebook_tab,
            }.items():
                with gr.Tab(name, elem_id=f"tab-{name.lower()}"):
                    tab()
        return page

    def _reconstruct_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=260):
                image, resize, button = self._picture_in("Reconstruct")
            with gr.Column(min_width=260):
                decoded, change = picture("what the codes decode to"), picture("difference: grey where equal")
        figures = gr.Markdown(elem_id="reconstruct-figures")
        with gr.Row():
            codes = picture("the codes, a colour each")
            code_bits, pixel_bits = picture("bits of each code, black: 0"), picture("bits of each pixel, black: 0")
        outputs = [decoded, change, codes, code_bits, pixel_bits, figures]
        told: dict[str, Any] = {"show_progress_on": figures, **_TURNS}
        button.click(self.answers.reconstruct, [image, resize], outputs, api_name="reconstruct", **told)

    def _sample_tab(self) -> None:
        names = self.service.class_names
        with gr.Row():
            with gr.Column(min_width=260, scale=1):
                label = gr.Dropdown([ANY_CLASS, *names], value=ANY_CLASS, label="class", interactive=bool(names))
                num = gr.Slider(1, MOST_SAMPLES, 8, step=1, label="images")
                seed = gr.Number(0, precision=0, label="seed")
                temperature = gr.Slider(0, 2, 1, step=0.05, label="temperature")
                guidance = gr.Slider(1, 5, 1, step=0.25, label="guidance (1: none)")
                top_k = gr.Slider(0, 256, 0, step=1, label="top-k (0: all codes)")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top-p (1: all codes)")
                order = gr.Checkbox(
                    False, label="in any order, several codes a step", interactive=self.service.any_order is not None
                )
                steps = gr.Slider(1, 49, 16, step=1, label="steps, of the prior in any order")
                button = gr.Button("Sample", variant="primary", elem_id="sample")
            with gr.Column(min_width=260, scale=3):
                images = gallery("samples", 4, "samples")
                codes = gr.File(label="their codes, as a numpy file")
        inputs = [label, num, seed, temperature, guidance, top_k, top_p, order, steps]
        gr.Examples([[name] for name in names[:10]] or [[ANY_CLASS]], [label], label="examples")
        told: dict[str, Any] = {"show_progress_on": images, **_TURNS}
        button.click(self.answers.sample, inputs, [images, codes], api_name="sample", **told)

    def _inpaint_tab(self) -> None:
        if self.service.any_order is None:
            gr.Markdown(
                "To paint over a part of a picture and have it made anew takes a prior in any order, and there is none "
                "of these codes. `vqvae train --stage prior --prior-kind AnyOrder --tokenizer RUN --run OTHER` trains "
                "one; start the page with `--any-order OTHER`."
            )
            return
        names = self.service.class_names
        side = maps.SIDE
        with gr.Row():
            with gr.Column(min_width=260):
                gr.Markdown(
                    "Paint over what is to be made anew. The picture is scaled to the model's size, and its middle is "
                    "kept."
                )
                editor = gr.ImageEditor(
                    type="pil",
                    show_label=False,
                    brush=gr.Brush(default_size=side // 6, colors=["#e63c3c"], color_mode="fixed"),
                    layers=False,
                    transforms=(),
                    sources=("upload", "clipboard"),
                    canvas_size=(side, side),
                    format="png",
                    elem_id="editor",
                )
                careful(editor)
                label = gr.Dropdown([ANY_CLASS, *names], value=ANY_CLASS, label="class", interactive=bool(names))
                num = gr.Slider(1, MOST_ANSWERS, 4, step=1, label="answers")
                seed = gr.Number(0, precision=0, label="seed")
                button = gr.Button("Inpaint", variant="primary", elem_id="inpaint")
            with gr.Column(min_width=260):
                answers = gallery("answers", 2, "answers")
        gr.Examples([[example] for example in self._painted()], [editor], label="examples")
        button.click(self.answers.inpaint, [editor, label, num, seed], answers, api_name="inpaint", **_TURNS)

    def _painted(self) -> list[dict[str, Any]]:
        """Examples with a half painted over."""
        found = []
        for number, name in enumerate(self.examples[:3]):
            picture = Image.open(name).convert("RGB").resize((maps.SIDE, maps.SIDE), Image.Resampling.NEAREST)
            layer = Image.new("RGBA", picture.size)
            half = (0, 0, maps.SIDE // 2, maps.SIDE) if number % 2 else (0, maps.SIDE // 2, maps.SIDE, maps.SIDE)
            layer.paste((230, 60, 60, 255), half)
            paths = [self.folder / f"painted-{number}-{what}.png" for what in ("under", "layer", "both")]
            both = picture.convert("RGBA")
            both.alpha_composite(layer)
            for path, each in zip(paths, (picture, layer, both), strict=True):
                each.save(path)
            found.append(
                {"background": str(paths[0]), "layers": [str(paths[1])], "composite": str(paths[2])},
            )
        return found

    def _compress_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=260):
                image, resize, button = self._picture_in("Compress")
            with gr.Column(min_width=260):
                file = gr.File(label="the file")
                figures = gr.Markdown(elem_id="compress-figures")
                again = picture("what the file decodes to")
        gr.Markdown(
            "**And back**: the file that was just written, or another that this page or `vqvae compress` wrote with "
            "this model."
        )
        with gr.Row():
            with gr.Column(min_width=260):
                given = gr.File(label="a file", elem_id="given")
                back = gr.Button("Decompress", elem_id="decompress")
            with gr.Column(min_width=260):
                images = gallery("its pictures", 4, "decompressed")
        told: dict[str, Any] = {"show_progress_on": figures, **_TURNS}
        button.click(self.answers.compress, [image, resize], [file, figures, again], api_name="compress", **told)
        file.change(lambda path: path, file, given, api_visibility="private")
        back.click(self.answers.decompress, given, images, api_name="decompress", **_TURNS)

    def _dream_tab(self) -> None:
        gr.Markdown(
            "A file of this model is bits, and any bits are a file. Type a text, and see the pictures whose file it "
            "is; a short one is said again and again."
        )
        with gr.Row():
            with gr.Column(min_width=260):
                text = gr.Textbox(label="a text", lines=4, max_length=MOST_TEXT, elem_id="text")
                num = gr.Slider(1, MOST_DREAMS, 4, step=1, label="pictures at most")
                button = gr.Button("Dream", variant="primary", elem_id="dream")
                gr.Examples(
                    [["To be, or not to be, that is the question."], ["vqvae " * 300]], [text], label="examples"
                )
            with gr.Column(min_width=260):
                images = gallery("its pictures", 4, "dreams")
                figures = gr.Markdown(elem_id="dream-figures")
        told: dict[str, Any] = {"show_progress_on": figures, **_TURNS}
        button.click(self.answers.dream, [text, num], [images, figures], api_name="dream", **told)

    def _codebook_tab(self) -> None:
        state = gr.State(None)
        gr.Markdown("**Exchange a code**: open a picture, click a place in it, and give that place another code.")
        with gr.Row():
            with gr.Column(min_width=260):
                image, _, button = self._picture_in("Open", as_it_is=False)
            with gr.Column(min_width=260):
                decoded = picture("what the codes decode to: click a place", elem_id="clickable")
                place = gr.Markdown(elem_id="place")
            with gr.Column(min_width=260):
                code = gr.Number(
                    0, precision=0, label=f"code, 0 to {self.service.model.num_codes - 1:,}", elem_id="code"
                )
                exchange = gr.Button("Exchange", elem_id="exchange")
                show = gr.Button("Show this code", elem_id="show")
                gr.Examples([[number] for number in (0, 7, 42)], [code], label="examples")
        outputs = [state, decoded, place]
        told: dict[str, Any] = {"show_progress_on": place, "api_visibility": "private", **_TURNS}
        button.click(self.answers.open, image, outputs, **told)
        decoded.select(self.answers.choose, state, [*outputs, code], **told)
        exchange.click(self.answers.exchange, [state, code], outputs, **told)
        gr.Markdown("**A code**: what is decoded around it, and what its nearest neighbours look like.")
        figures = gr.Markdown(elem_id="code-figures")
        with gr.Row():
            with gr.Column(min_width=260):
                contexts = gallery("in context", 4, "contexts")
            with gr.Column(min_width=260):
                near = gallery("nearest codes", 4, "near")
        told: dict[str, Any] = {"show_progress_on": figures, **_TURNS}
        show.click(self.answers.code, code, [contexts, near, figures], api_name="code", **told)
        most = gr.Button("Codes by use", elem_id="atlas-button")
        atlas = gallery("from the most used code to the least", 8, "atlas")
        most.click(self.answers.atlas, None, atlas, api_name="atlas", **_TURNS)

    def _picture_in(self, verb: str, *, as_it_is: bool = True) -> tuple[gr.Image, gr.Checkbox, gr.Button]:
        """A picture, whether to fit it to the model's size, a button, and examples.

        Args:
            as_it_is: whether it may be larger than that.
        """
        (height, width), image = self.service.model.size, upload("a picture")
        label = f"scale and crop to {width}x{height}; else in tiles, at most {MOST_SIDE} pixels a side"
        resize = gr.Checkbox(True, label=label, visible=as_it_is)
        button = gr.Button(verb, variant="primary", elem_id=verb.lower())
        gr.Examples([[each] for each in self.examples], [image], label="examples")
        return image, resize, button


def picture(label: str, **more: Any) -> gr.Image:
    """A place for a picture that is made here, with what it is above, as a label would lie on it."""
    with gr.Column(min_width=200):
        gr.Markdown(label)
        options: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["download"]}
        return gr.Image(show_label=False, label=label, alt_text=label, **options, **more)


def gallery(label: str, columns: int, name: str) -> gr.Gallery:
    """A place for several, with what they are above."""
    gr.Markdown(label)
    return gr.Gallery(show_label=False, label=label, columns=columns, format="png", height="auto", elem_id=name)


def upload(label: str) -> gr.Image:
    """A place to drop a picture; what comes out is its file, unread, so that what is wrong with it can be said."""
    image = gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=280)

    def preprocess(payload: Any) -> str | None:
        return None if payload is None else payload.path

    image.preprocess = preprocess  # pyrefly: ignore
    return image


def careful(editor: gr.ImageEditor) -> None:
    """Let an editor say in words what is no picture, or is too large a one."""
    as_it_is = editor.preprocess

    def preprocess(payload: Any) -> Any:
        for part in (payload.background, *(payload.layers or ())) if payload is not None else ():
            if part is not None and part.path is not None:
                try:
                    read_picture(part.path, 3)
                except ValueError as error:
                    raise gr.Error(str(error), print_exception=False) from None
        return as_it_is(payload)

    editor.preprocess = preprocess  # pyrefly: ignore


def launch(page: gr.Blocks, folder: Path, *, host: str, port: int | None) -> str:
    """Serve the page in threads of their own; its address.

    Raises:
        ValueError: the port is taken, or the host is no address of this machine.
    """
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ValueError(
            f"got --host {host}, expected an address of this machine, as 127.0.0.1, or 0.0.0.0 for all of them"
        ) from error
    try:
        _, address, _ = page.queue(max_size=32).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            show_error=True,
            max_file_size=MOST_BYTES,
            allowed_paths=[str(folder)],
            theme=THEME,
            css=CSS,
            footer_links=["api"],
        )
    except OSError as error:
        raise ValueError(
            f"the page cannot be served at {host}, port {port or '7860 to 7959'}: it is taken; name another with --port"
        ) from error
    return address
