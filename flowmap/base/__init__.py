"""The ground floor: files, settings, images and processes. Every other package may import it."""
