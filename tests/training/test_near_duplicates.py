from pictures import product
from PIL import Image, ImageDraw

from pic_training.near_duplicates import Look, first_copies, groups_of, look_of


def moved(image: Image.Image, pixels: int) -> Look:
    """The look of a frame whose camera has moved to the right."""
    return look_of(image.crop((pixels, 0, image.width, image.height)))


def test_a_copy_is_found_and_another_colour_is_none() -> None:
    picture = product(1)
    red, green, blue = picture.split()
    smaller = look_of(picture.resize((90, 90)))
    recoloured = look_of(Image.merge("RGB", (blue, red, green)))
    among = [look_of(product(2)), look_of(picture), look_of(picture)]
    assert list(first_copies([smaller, recoloured], among)) == [1, None]


def test_a_chain_of_copies_is_one_group_under_its_smallest_name() -> None:
    picture = product(3)
    steps = {f"frame-{n:02d}": moved(picture, n) for n in range(20)}
    first, last = steps["frame-00"], steps["frame-19"]
    assert list(first_copies([first], [last])) == [None], "the ends are not alike"
    groups = groups_of({"another": look_of(product(4)), **dict(reversed(steps.items()))})
    assert groups == {"another": "another", **dict.fromkeys(steps, "frame-00")}


def test_thousands_of_frames_of_one_scene_are_one_group() -> None:
    """Compared pair by pair these would take a quarter of an hour."""
    look = look_of(product(5))
    frames = {f"{n:05d}": Look(look.hash, look.thumbnail) for n in range(10_000)}
    assert set(groups_of(frames).values()) == {"00000"}


def test_another_colour_of_a_small_thing_before_a_plain_background_is_no_copy() -> None:
    def thing(colour: str) -> Image.Image:
        picture = Image.new("RGB", (200, 200), "white")
        pen = ImageDraw.Draw(picture)
        pen.ellipse((70, 60, 130, 140), fill=colour)
        pen.rectangle((90, 90, 110, 105), fill="white")
        return picture

    green = thing("darkgreen")
    copies = [green.resize((60, 60)), green.crop((2, 2, 198, 198))]
    looks = [look_of(picture) for picture in (*copies, thing("maroon"))]
    assert list(first_copies(looks, [look_of(green)])) == [0, 0, None]


def test_another_thin_outline_on_white_is_no_copy() -> None:
    def outline(width: int, height: int, radius: int) -> Image.Image:
        picture = Image.new("RGB", (400, 400), "white")
        box = (200 - width, 200 - height, 200 + width, 200 + height)
        pen = ImageDraw.Draw(picture)
        pen.rounded_rectangle(box, radius, outline="#c8a03c", width=6)
        return picture

    ring, oval, square = (
        outline(150, 150, 150),
        outline(150, 140, 140),
        outline(140, 140, 100),
    )
    darker = ring.point(lambda level: level * 0.97)
    copies = [ring.resize((90, 90)), ring.crop((3, 3, 397, 397)), darker]
    looks = [look_of(picture) for picture in (*copies, oval, square)]
    assert list(first_copies(looks, [look_of(ring)])) == [0, 0, 0, None, None]


def test_copies_of_a_picture_of_one_colour_are_copies() -> None:
    plain, other = (
        Image.new("RGB", (100, 100), "beige"),
        Image.new("RGB", (100, 100), "navy"),
    )
    compressed = look_of(Image.new("RGB", (40, 40), (245, 244, 220)))  # a level off
    looks = [compressed, look_of(other)]
    assert list(first_copies(looks, [look_of(plain)])) == [0, None]
