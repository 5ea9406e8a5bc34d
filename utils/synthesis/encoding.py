"""Images into the bytes of image files, beside the sampling."""

import io
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image as PILImage

NUM_THREADS = 2
MAX_WAITING = 256  # images; at 512 pixels a side 200 MB


class Encoders:
    """Threads that encode images. Who gives them too many waits until some are done."""

    def __init__(self, image_format: str, quality: int):
        self.image_format = image_format
        self.quality = quality
        self._threads = ThreadPoolExecutor(NUM_THREADS)
        self._places = threading.BoundedSemaphore(MAX_WAITING)

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(cancel_futures=True)

    def submit(self, pixels: np.ndarray) -> Future:
        """Return the future of the encoded `(height, width, 3)` uint8 pixels."""
        self._places.acquire()
        future = self._threads.submit(encode_image, pixels, self.image_format, self.quality)
        future.add_done_callback(lambda _: self._places.release())
        return future


def encode_image(pixels: np.ndarray, image_format: str, quality: int) -> bytes:
    """Return `(height, width, 3)` uint8 pixels as the bytes of an image file.

    `quality`, 1 to 100, is that of a JPEG or WebP file; PNG is lossless.
    """
    buffer = io.BytesIO()
    options = {} if image_format == "png" else {"quality": quality}
    PILImage.fromarray(pixels).save(buffer, format=image_format, **options)
    return buffer.getvalue()
