"""The buttons that lead to the repository: edit, issue, Colab, Binder. Its address stands in pyproject.toml, and
nowhere else.

Where none is set there are no such buttons, rather than some that lead to a wrong place. Colab opens repositories of
GitHub only; Binder builds any from its environment.yml. They are plain links: the page asks neither for anything.
"""
from executed import ROOT  # noqa: F401 (it puts the root on the path)

from tools.launch import repository_url

BUTTONS = ("use_repository_button", "use_edit_page_button", "use_issues_button")


def add_buttons(app, config):
    url, options = config.book_repository, config.html_theme_options
    launch = {"notebook_interface": "jupyterlab", "binderhub_url": "https://mybinder.org"}
    if url and "github.com/" in url:
        launch["colab_url"] = "https://colab.research.google.com"
    options.update(dict.fromkeys(BUTTONS, bool(url)), repository_url=url, repository_branch="main",
                   launch_buttons=launch if url else {})


def setup(app):
    app.add_config_value("book_repository", repository_url() or "", "html", str)
    app.connect("config-inited", add_buttons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
