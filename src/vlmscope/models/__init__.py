"""Vision-language models behind one adapter per family, loading, exact arithmetic and recordable attention."""
