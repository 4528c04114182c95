"""The identities of docs/maths.md as functions of a model at one prompt, each measured, for users and for the tests."""
