"""The Shapes world: scenes, a renderer, a checker and a tiny Janus model, so that all of OSPO runs anywhere."""
