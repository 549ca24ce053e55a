"""What a shop needs at least."""

import os
from urllib.parse import urlsplit

url = urlsplit(os.environ["SHOP_DATABASE_URL"])  # postgresql://…
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": url.hostname,
        "PORT": url.port,
        "USER": url.username,
        "PASSWORD": url.password or "",
        "NAME": url.path[1:],
    }
}
INSTALLED_APPS = ["shop"]
ROOT_URLCONF = "shop.views"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
SECRET_KEY = os.environ["SHOP_SECRET_KEY"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
