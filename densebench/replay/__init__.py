"""Work that is recorded once and played back, without the Python that decided it."""
